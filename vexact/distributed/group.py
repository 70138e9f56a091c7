"""What the driver sees of its workers, however they are reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from vexact import interrupt
from vexact.distributed.layout import RankInfo


class Pending(Protocol):
    """A call that may still be running."""

    def done(self) -> bool:
        """Whether ``result()`` would not wait. Raises what ``result()`` would if a worker of the group has failed."""

    def result(self) -> list[Any]:
        """Waits for every rank that was called; their results in the order of ``ranks``.

        Raises:
            WorkerError: a worker of the group died, hung past the deadline, ran out of memory or met a bug.
            Exception: what a worker raised on purpose, with a note that names its rank.
        """


class WorkerGroup(ABC):
    """Objects that a factory made, one per process, and calls of their methods.

    Every rank does what it is called for in the order of the calls. Arguments and results travel by pickle, except to
    and from a worker in the driver's own process; tensors among them have to be on the CPU. The first failure ends the
    group: all its processes are ended, and every later call raises that failure again.
    """

    infos: tuple[RankInfo, ...]

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.infos)

    @abstractmethod
    def start_each(
        self,
        method: str,
        args_per_rank: Sequence[tuple[Any, ...]],
        *,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        stage: str = "",
    ) -> Pending:
        """Has every rank of ``ranks`` (None: all) call ``method`` with its own arguments; does not wait.

        Args:
            method: the name of a method of the workers.
            args_per_rank: the arguments of each, in the order of ``ranks``.
            timeout_s: seconds until the call counts as hung; None for the group's.
            stage: what is being done, for messages; the method's name by default.
        """

    @abstractmethod
    def start(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        stage: str = "",
        **kwargs: Any,
    ) -> Pending:
        """Like ``start_each`` with the same arguments for all, pickled once; keyword arguments are the method's."""

    @abstractmethod
    def close(self) -> None:
        """Ends the workers and waits until they are gone. Calls their ``close()`` if they have one and nothing failed.

        Idempotent; never raises for a worker that is already gone.
        """

    def call(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        stage: str = "",
        **kwargs: Any,
    ) -> list[Any]:
        """``start(…).result()``."""
        return self.start(method, *args, ranks=ranks, timeout_s=timeout_s, stage=stage, **kwargs).result()

    @abstractmethod
    def tell_lost(self) -> None:
        """After a signal: raises WorkerError if a launcher may have sent it because a rank has died. Looks for that for
        a moment, once."""

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Around what works with the group: ``tell_lost`` when a signal ends it, wherever that has landed."""
        try:
            yield
        except BaseException:
            if interrupt.requested():
                self.tell_lost()
            raise

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if interrupt.requested():
                self.tell_lost()
        finally:
            self.close()

    def _ranks(self, ranks: Sequence[int] | None) -> tuple[int, ...]:
        chosen = tuple(range(self.size)) if ranks is None else tuple(ranks)
        assert len(set(chosen)) == len(chosen), chosen
        assert all(0 <= rank < self.size for rank in chosen), chosen
        return chosen
