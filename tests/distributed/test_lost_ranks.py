"""torchrun signals rank 0 when another rank has died: whatever comes first, the death is told. A signal of the user's
stays one."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace

import dummy_worker
import pytest
from processes import until

from vexact import interrupt
from vexact.distributed import RankInfo, WorkerError
from vexact.distributed.host import WorkerHost
from vexact.distributed.on_torchrun import agent, driver
from vexact.distributed.on_torchrun.driver import TorchrunChannel
from vexact.distributed.remote import SIGNAL_S, Arrival, RemoteGroup


class Rank:
    """Rank 1, which can die, and rank 0 with its group."""

    def __init__(self) -> None:
        infos = [RankInfo(rank, 2, rank, rank, "elsewhere", 100 + rank, "cpu") for rank in range(2)]
        host = WorkerHost(infos[0])
        host.make(dummy_worker.make)
        ours, self._its = Pipe()
        self.connection = Late(os.dup(ours.fileno()))
        ours.close()
        self.channel = TorchrunChannel(infos, host, [self.connection])
        self.group = RemoteGroup(self.channel, 300.0)

    def die(self) -> None:
        self._its.close()
        assert until(lambda: self.channel._gone[1].is_set() or not self.connection.free.is_set())

    @contextmanager
    def ending(self) -> Iterator[None]:
        """The clean-up ends rank 1, which leaves."""
        try:
            yield
        finally:
            self.channel.end(politely=False)
            self.die()


class Late(Connection):
    """One whose end is read when ``free`` is set."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self.free = threading.Event()
        self.free.set()

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        try:
            return super().recv_bytes(maxlength)
        finally:
            self.free.wait()


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    monkeypatch.setattr(driver.signal, "signal", lambda *_: None)  # the end of a group ignores SIGTERM from then on
    monkeypatch.setattr(driver, "END_S", 0.1)
    for name in ("_requested", "_is_withdrawn", "_is_said"):
        monkeypatch.setattr(interrupt, name, False)
    for name in ("_cause", "_note"):
        monkeypatch.setattr(interrupt, name, "")
    rank = Rank()
    yield rank
    rank.connection.free.set()
    rank.die()
    rank.group.close()


@contextmanager
def told(stage: str) -> Iterator[None]:
    try:
        with pytest.raises(WorkerError, match=rf"rank 1 \(host elsewhere, pid 101\) died in {stage}"):
            yield
    except KeyboardInterrupt:  # would end all tests
        pytest.fail("interrupted, and no rank is named")


def signal_comes(error: type[BaseException] = KeyboardInterrupt) -> None:
    interrupt._requested = True
    raise error


def test_a_death_that_the_interrupt_drops_with_the_arrivals_is_told(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler runs when the arrival is out of the queue, and before anybody has it."""
    receive = rank.channel.receive

    def interrupted(timeout_s: float) -> list[Arrival]:
        arrivals = receive(timeout_s)
        if arrivals and not interrupt.requested():
            signal_comes()
        return arrivals

    pending = rank.group.start("who", ranks=[1], stage="generation")
    monkeypatch.setattr(rank.channel, "receive", interrupted)
    rank.die()
    with told("generation"):
        pending.result()
    assert not interrupt.requested(), "the death ends the run, not the signal"


def test_a_death_is_told_that_the_reading_thread_has_not_seen_yet(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine it may not run before the time is over that is waited for news."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 1.5 * SIGNAL_S:
            rank.connection.free.set()
            assert until(rank.channel._gone[1].is_set)

    rank.connection.free.clear()
    rank.group.start("who", ranks=[1], stage="generation")
    rank.die()
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with told("generation"), rank.group.heeding():
        signal_comes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_death_is_told_when_the_signal_lands_outside_of_any_call(error: type[BaseException], rank: Rank) -> None:
    """``RuntimeError``: foreign code made another error of the interrupt."""
    rank.die()
    with told("an idle moment"), rank.group.heeding():
        signal_comes(error)
    assert not interrupt.requested()
    with told("an idle moment"):
        rank.group.call("who")


def test_a_death_is_told_when_the_clean_up_closes_the_group_first(rank: Rank, caplog: pytest.LogCaptureFixture) -> None:
    """As a checkpoint does that is given up."""
    rank.die()
    with told("an idle moment"), rank.group, closing(rank.group):
        signal_comes()
    assert not interrupt.requested()
    assert caplog.text == "", "it is told once"


def test_the_users_signal_stays_one(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank leaves as well, since the group ends."""
    monkeypatch.setattr("vexact.distributed.remote.SIGNAL_S", 0.1)
    with pytest.raises(KeyboardInterrupt), rank.group, rank.ending(), rank.group.heeding():
        signal_comes()
    assert interrupt.requested()
    assert interrupt.message() == "\ninterrupted\n"


def test_ranks_that_leave_with_their_agent_are_not_lost(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is the one that rank 0 sends itself then."""
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    monkeypatch.setattr(agent, "_agent", ended.pid)
    monkeypatch.setattr("vexact.distributed.remote.SIGNAL_S", 0.1)
    rank.die()
    with pytest.raises(KeyboardInterrupt), rank.group.heeding():
        signal_comes()
    assert interrupt.requested()
