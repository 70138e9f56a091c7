"""Workers in other processes: deadlines, and which of several failures is the one to tell."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vexact import interrupt
from vexact.distributed.errors import WorkerError
from vexact.distributed.failure import CAUSES, Failure, error_of
from vexact.distributed.group import Pending, WorkerGroup
from vexact.distributed.host import Call
from vexact.distributed.layout import RankInfo

log = logging.getLogger(__name__)
POLL_S = 0.2  # how often a wait looks at signals and deadlines
SETTLE_S = 0.3  # after a failure that explains itself, for others that came at the same moment
SIGNAL_S = 1.0  # after a launcher's signal, for the news of the death that it was sent for
CAUSE_S = 10.0  # after a failure that another rank must have caused, for that rank's
ANSWER_S = 3.0  # a process that does not say within this time where it is does not run
TIMEOUT_KEY = "trainer.worker_timeout_s"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A rank's answer to one call, or its death; ``ticket`` is None for a death that no call had to find out."""

    rank: int
    ticket: int | None
    value: Any = None
    failure: Failure | None = None


class Channel(ABC):
    """How calls reach the other processes."""

    infos: tuple[RankInfo, ...]

    @abstractmethod
    def send(self, ticket: int, ranks: Sequence[int], calls: Sequence[Call]) -> None:
        """Sends a rank's call to each, without waiting for any of them; one call for several ranks travels once."""

    @abstractmethod
    def receive(self, timeout_s: float) -> list[Arrival]:
        """All that has come, after waiting for the first for at most so long."""

    @abstractmethod
    def where(self, ranks: Sequence[int], timeout_s: float) -> Mapping[int, str]:
        """What ranks are doing, of those that answer in time."""

    def lost(self, timeout_s: float) -> list[Failure]:
        """After a signal: the deaths that the launcher may have sent it for, after waiting for the first. None where
        launchers send no signal for a death: the signal is the user's then, whoever else has gone."""
        return []

    @abstractmethod
    def end(self, politely: bool) -> None:
        """Ends all processes, letting workers close first if ``politely``; idempotent, raises nothing."""


@dataclass(slots=True)
class _Open:
    """A call that not every rank has answered."""

    stage: str
    ranks: tuple[int, ...]
    deadline: float
    timeout_s: float
    key: str  # that sets it, if one does
    values: dict[int, Any] = field(default_factory=dict)

    def missing(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.values]

    def limit(self) -> str:
        return f"{self.timeout_s:g} s ({self.key})" if self.key else f"{self.timeout_s:g} s"


class RemoteGroup(WorkerGroup):
    """A group behind a channel."""

    def __init__(self, channel: Channel, timeout_s: float) -> None:
        self.infos = channel.infos
        self._channel, self._timeout_s = channel, timeout_s
        self._open: dict[int, _Open] = {}
        self._last: dict[int, str] = {}  # of each rank, the stage that was sent to it last
        self._next = 0
        self._failure: Exception | None = None
        self._is_closed = self._has_heeded_signal = False

    def start_each(
        self,
        method: str,
        args_per_rank: Sequence[tuple[Any, ...]],
        *,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        stage: str = "",
    ) -> Pending:
        chosen = self._ranks(ranks)
        assert len(args_per_rank) == len(chosen), (len(args_per_rank), chosen)
        calls = [Call(method, stage or method, args, {}) for args in args_per_rank]
        return self._send(chosen, calls, timeout_s)

    def start(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        stage: str = "",
        **kwargs: Any,
    ) -> Pending:
        chosen = self._ranks(ranks)
        return self._send(chosen, [Call(method, stage or method, args, kwargs)] * len(chosen), timeout_s)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if interrupt.requested():
                self._find_lost()
            if self._failure is None:
                failures = self._take(self._channel.receive(0.0))
                if failures:  # of which nobody was told
                    self._failure = self._explain(failures)
                    log.error("%s", self._failure)
        finally:  # whoever presses Ctrl-C again meanwhile leaves no process behind either
            self._channel.end(politely=self._failure is None and not self._open)

    def tell_lost(self) -> None:
        if self._find_lost():
            self._channel.end(politely=False)
            interrupt.withdraw()
            assert self._failure is not None
            raise self._failure

    def prepare(self, factory: Callable[[RankInfo], Any], address: str | None, start_timeout_s: float) -> None:
        """Joins the processes in the default group and makes their workers.

        Args:
            address: of rank 0's machine, where it opens the rendezvous; None where the launcher has opened one.
        """
        everyone = tuple(range(self.size))

        def on_host(method: str, stage: str, seconds: float | None, ranks: tuple[int, ...], *args: Any) -> list[Any]:
            call = Call(method, stage, args, {}, on_host=True)
            return self._send(ranks, [call] * len(ranks), seconds).result()

        port = 0
        if address is not None:
            stage = "opening the rendezvous of the process group"
            port = on_host("serve_store", stage, start_timeout_s, (0,), address, start_timeout_s)[0]
        stage = "joining the process group"
        on_host("join", stage, start_timeout_s, everyone, address, port, start_timeout_s, self._timeout_s)
        on_host("make", "set-up", start_timeout_s if start_timeout_s > self._timeout_s else None, everyone, factory)

    def _send(self, ranks: tuple[int, ...], calls: Sequence[Call], timeout_s: float | None) -> Pending:
        self._look()
        assert not self._is_closed, "the group is closed"
        ticket, self._next = self._next, self._next + 1
        seconds = self._timeout_s if timeout_s is None else timeout_s
        key = TIMEOUT_KEY if timeout_s is None else ""
        opened = _Open(calls[0].stage if calls else "", ranks, time.monotonic() + seconds, seconds, key)
        if ranks:
            self._channel.send(ticket, ranks, calls)
            self._open[ticket] = opened
            self._last |= dict.fromkeys(ranks, opened.stage)
        return _Answer(self, opened)

    def _look(self, wait_s: float = 0.0) -> None:
        """Takes in what has come, and stops at the first failure and at the first deadline that has passed."""
        if self._failure is not None:
            raise self._failure
        failures: list[tuple[Failure, str]] = []
        error = None
        try:
            interrupt.check()
            failures += self._take(self._channel.receive(wait_s))
            if failures:
                error = self._explain(failures)
        except KeyboardInterrupt:  # torchrun ends all ranks when one has died
            self.tell_lost()
            failures = [one for one in failures if one[0].kind == "died"]
            if not failures:
                raise
            error = self._explain(failures)
        if error is not None:
            self._fail(error)
        now = time.monotonic()
        for opened in self._open.values():
            if now > opened.deadline:
                self._fail(self._hung(opened))

    def _find_lost(self) -> bool:
        """After a signal: whether a rank has died that it may have been sent for, which is the failure then."""
        waits = self._failure is None and not self._has_heeded_signal
        self._has_heeded_signal = True
        lost = self._channel.lost(SIGNAL_S if waits else 0.0)
        if lost and self._failure is None:
            self._failure = self._explain([(failure, self._stage_of(failure.rank)) for failure in lost])
            interrupt.cause(str(self._failure))
        return bool(lost)

    def _take(self, arrivals: Sequence[Arrival]) -> list[tuple[Failure, str]]:
        """Files results; the failures among the arrivals, each with its stage, in order."""
        failures = []
        for arrival in arrivals:
            opened = self._open.get(arrival.ticket) if arrival.ticket is not None else None
            if arrival.failure is not None:
                failures.append((arrival.failure, opened.stage if opened else self._stage_of(arrival.rank)))
            elif opened is not None:
                opened.values[arrival.rank] = arrival.value
                if not opened.missing():
                    del self._open[arrival.ticket]  # type: ignore[arg-type]
        return failures

    def _stage_of(self, rank: int) -> str:
        """What the rank was asked for when it failed by itself, as far as that can be known from here."""
        idle = f"an idle moment after {self._last[rank]}" if rank in self._last else "an idle moment"
        return next((opened.stage for opened in self._open.values() if rank in opened.missing()), idle)

    def _explain(self, failures: list[tuple[Failure, str]]) -> Exception:
        """The one exception for all failures that belong together, after waiting for the cause if it is not among
        them yet."""
        start = time.monotonic()

        def has_cause() -> bool:
            return any(failure.kind != "consequence" for failure, _ in failures)

        while time.monotonic() < start + (SETTLE_S if has_cause() else CAUSE_S) and self._waited_for(failures):
            failures += self._take(self._channel.receive(POLL_S / 2))
        if not has_cause():
            waited_for = self._waited_for(failures)
            places = self._channel.where(waited_for, ANSWER_S)
            silent = [rank for rank in waited_for if rank not in places]
            if silent:
                return self._silence(silent, failures[0][1])
        first = min(failures, key=lambda one: CAUSES.index(one[0].kind))[0]  # the earliest of the gravest
        same = sorted({f.rank for f, _ in failures if (f.kind, f.summary) == (first.kind, first.summary)})
        failure, stage = next((f, s) for f, s in failures if f.rank == same[0] and f.summary == first.summary)
        error = error_of(failure, self.infos[failure.rank], stage)
        if len(same) > 1:
            error.add_note(f"ranks {', '.join(map(str, same))} say the same")
        return error

    def _hung(self, opened: _Open) -> Exception:
        """What to say of a call whose deadline has passed."""
        missing = opened.missing()
        places = self._channel.where(missing, ANSWER_S)
        silent = [rank for rank in missing if rank not in places]
        if silent:
            return self._silence(silent, opened.stage, opened)
        found = "; ".join(f"{self.infos[rank]} is in {places[rank]}" for rank in missing)
        remedy = f"; raise {opened.key} if it only was slow" if opened.key else ""
        return WorkerError(
            f"{opened.stage} has taken longer than {opened.limit()}: {found}{remedy}",
            missing[0],
            opened.stage,
        )

    def _waited_for(self, failures: Sequence[tuple[Failure, str]]) -> list[int]:
        """Ranks that have neither answered nor failed."""
        missing = {rank for opened in self._open.values() for rank in opened.missing()}
        return sorted(missing - {failure.rank for failure, _ in failures})

    def _silence(self, ranks: Sequence[int], stage: str, late_for: _Open | None = None) -> Exception:
        names = " and ".join(str(self.infos[rank]) for rank in ranks)
        late = f" and has not finished in {late_for.limit()}" if late_for is not None else ""
        return WorkerError(
            f"{names} hangs in {stage}: the process does not answer{late}; it is stopped, or its machine is gone or "
            "swapping",
            ranks[0],
            stage,
        )

    def _fail(self, error: Exception) -> None:
        self._failure = error
        if getattr(error, "is_fault", False):  # the launcher's signal may end this process before the error is told
            interrupt.cause(str(error))
        self._channel.end(politely=False)
        raise error


@dataclass(slots=True)
class _Answer:
    """A pending call of a group behind a channel."""

    group: RemoteGroup
    opened: _Open

    def done(self) -> bool:
        if self.opened.missing():
            self.group._look()
        return not self.opened.missing()

    def result(self) -> list[Any]:
        while self.opened.missing():
            self.group._look(POLL_S)
        return [self.opened.values[rank] for rank in self.opened.ranks]
