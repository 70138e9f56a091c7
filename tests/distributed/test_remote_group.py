"""One process's group, deadlines, and which of several failures is told: no process is started here."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dummy_worker
import numpy as np
import pytest
import torch
from processes import PATIENCE_S

from vexact import interrupt
from vexact.distributed import Layout, RankInfo, WorkerError, resolve_layout, start_workers
from vexact.distributed.errors import ClusterError
from vexact.distributed.failure import Failure, error_of, failure_of
from vexact.distributed.host import Call, WorkerHost
from vexact.distributed.on_ray.scratch import Scratch
from vexact.distributed.remote import Arrival, Channel, RemoteGroup
from vexact.distributed.versions import check_versions, versions

INFOS = tuple(RankInfo(rank, 3, rank, 0, "a", 100 + rank, "cpu") for rank in range(3))
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:3")


class Script(Channel):
    """Answers every call with what the script says, one batch per look; then with nothing more."""

    def __init__(self, *batches: Sequence[Arrival], silent: Sequence[int] = ()) -> None:
        self.infos, self._batches, self._silent = INFOS, list(batches), silent
        self.ended: list[bool] = []

    def send(self, ticket: int, ranks: Sequence[int], calls: Sequence[Call]) -> None:
        self.sent = [(rank, pickle.loads(pickle.dumps(call))) for rank, call in zip(ranks, calls, strict=True)]

    def receive(self, timeout_s: float) -> list[Arrival]:
        if not hasattr(self, "sent"):
            return []
        if not self._batches:
            time.sleep(timeout_s)
            return []
        return list(self._batches.pop(0))

    def where(self, ranks: Sequence[int], timeout_s: float) -> Mapping[int, str]:
        return {rank: "update, in all_reduce()" for rank in ranks if rank not in self._silent}

    def end(self, politely: bool) -> None:
        self.ended.append(politely)


def failed(rank: int, error: BaseException, ticket: int | None = 0) -> Arrival:
    try:
        raise error
    except BaseException as raised:
        return Arrival(rank, ticket, failure=failure_of(raised, rank))


def died(rank: int) -> Arrival:
    return Arrival(rank, None, failure=Failure(rank, "died", "its process is gone"))


def error_after(*batches: Sequence[Arrival], silent: Sequence[int] = (), timeout_s: float = 30.0) -> Exception:
    channel = Script(*batches, silent=silent)
    group = RemoteGroup(channel, timeout_s)
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the tests look at it)
        group.call("fail", stage="update")
    with pytest.raises(type(caught.value)) as again:
        group.call("who")
    assert again.value is caught.value
    group.close()
    assert channel.ended[0] is False, "after a failure nobody is asked to close"
    return caught.value


def test_one_process_is_called_directly() -> None:
    layout = resolve_layout(Layout(device="cpu"))
    assert (layout.world_size, layout.transport) == (1, "local")
    with start_workers(layout, dummy_worker.make) as group:
        array = np.zeros(2)
        assert group.call("add", array, more=0.5)[0] == pytest.approx([0.5, 0.5])
        pending = group.start_each("who", [()], ranks=[0])
        assert pending.done()
        assert pending.result() == list(group.infos)
        with pytest.raises(KeyError):
            group.call("fail", 0, "bug")
        assert group.size == len(group.call("who")), "a call that failed ends nothing in one process"


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(nnodes=2, device="cpu"), "trainer.nnodes=2 needs a Ray cluster"),
        (Layout(n_gpus_per_node=99, device="cuda"), r"trainer.n_gpus_per_node=99 .* PyTorch sees \d"),
        (Layout(n_gpus_per_node=2, ray_address="http://x:8265", device="cpu"), "`ray job submit"),
        (Layout(n_gpus_per_node=2, ray_address="nonsense", device="cpu"), "must be host:port"),
    ],
)
def test_a_layout_that_cannot_be_had(layout: Layout, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        resolve_layout(layout)


def test_a_cluster_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"trainer.ray_address=127.0.0.1:1: no Ray head answers .* unset"):
        resolve_layout(Layout(ray_address="127.0.0.1:1"))
    import ray

    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda folder: "127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS=auto: .*last cluster of this machine, 127.0.0.1:1, has ended"):
        resolve_layout(Layout())


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"several processes need Ray.*pip install 'vexact\[ray\]'"):
        start_workers(Layout(n_gpus_per_node=2, device="cpu"), dummy_worker.make)


def test_an_unknown_authentication_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=tokens: must be one of token, disabled"):
        start_workers(Layout(n_gpus_per_node=2, device="cpu"), dummy_worker.make)


def test_a_cluster_of_ones_own_leaves_nothing_and_keeps_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/a/long/temporary/directory")
    first, second = Scratch(), Scratch()
    folder, token = Path(first.options["_temp_dir"]), os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert (folder.parent, folder.exists()) == (Path("/tmp"), True)
    with first.marked():
        part = subprocess.Popen(["sleep", "999"])
    other = subprocess.Popen(["sleep", "999"])
    first.remove()
    first.remove()
    assert part.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()
    assert not folder.exists()
    assert Path(second.options["_temp_dir"]).exists()
    second.remove()
    assert not os.environ.get("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    scratch = Scratch()
    assert not os.environ.get("RAY_AUTH_TOKEN")
    scratch.remove()


def test_the_cause_is_told_and_not_what_followed_from_it() -> None:
    error = error_after([failed(0, LOST), failed(2, LOST)], [], [died(1)])
    assert isinstance(error, WorkerError)
    assert (error.rank, error.stage, error.is_bug) == (1, "update", False)
    assert str(error).startswith("rank 1 (host a, pid 101) died in update: its process is gone")
    error = error_after([failed(0, LOST)], [failed(2, ValueError("lr=-1"))])
    assert (type(error), str(error)) == (ValueError, "lr=-1")
    assert error.__notes__ == ["raised by rank 2 (host a, pid 102) in update"]
    assert "lr=-1" in str(error.__cause__)


def test_an_error_that_says_it_is_a_consequence_is_none_of_the_headline() -> None:
    class PeerStopped(RuntimeError):
        is_consequence = True

    error = error_after([failed(0, PeerStopped("rank 1 stopped")), failed(1, ValueError("bits differ"))])
    assert str(error) == "bits differ"


def test_a_lost_peer_without_a_cause_names_the_rank_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vexact.distributed.remote.CAUSE_S", 0.1)
    error = error_after([failed(0, LOST)], silent=[2])
    assert "rank 2 (host a, pid 102) hangs in update" in str(error)
    error = error_after([failed(0, LOST)])
    assert "rank 0 (host a, pid 100) lost another rank in update, which did not say why" in str(error)


def test_all_ranks_that_say_the_same_are_one_failure() -> None:
    error = error_after([failed(2, ValueError("no")), failed(0, ValueError("no")), failed(1, ValueError("no"))])
    assert error.__notes__ == ["raised by rank 0 (host a, pid 100) in update", "ranks 0, 1, 2 say the same"]


def test_a_bug_shows_the_workers_own_traceback() -> None:
    error = error_after([failed(1, KeyError("absent"))])
    assert isinstance(error, WorkerError)
    assert error.is_bug
    assert "KeyError: 'absent'" in str(error)
    assert "raise error" in str(error.__cause__)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. " + "Much more. " * 60),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_want_of_memory_names_what_to_lower(error: Exception) -> None:
    raised = error_after([failed(1, error)])
    text = str(raised)
    assert isinstance(raised, WorkerError)
    assert not raised.is_bug
    assert text.startswith("rank 1 (host a, pid 101) ran out of memory in update")
    assert "ppo_max_token_len_per_gpu" in text
    assert len(text) < 420
    host = WorkerHost(INFOS[1])
    host.make(dummy_worker.make)
    _, failure = host.run(Call("fail", "update", (1, "memory"), {}))
    assert failure is not None
    assert failure.summary.endswith("To need less memory: lower the size of the dummy")


def test_an_error_that_does_not_travel_is_still_told() -> None:
    class Local(ValueError):  # not importable, so not picklable
        pass

    error = error_after([failed(1, Local("lr=-1 is wrong"))])
    assert isinstance(error, WorkerError)
    assert not error.is_bug
    assert str(error) == "rank 1 (host a, pid 101) in update: lr=-1 is wrong"


def test_a_deadline_names_who_is_silent_or_else_where_each_rank_is() -> None:
    done = [Arrival(0, 0, "value")]
    error = error_after(done, silent=[2], timeout_s=0.1)
    assert isinstance(error, WorkerError)
    assert error.rank == 2
    assert "hangs in update: the process does not answer and has not finished in 0.1 s" in str(error)
    error = error_after(done, timeout_s=0.1)
    assert "update has taken longer than 0.1 s (trainer.worker_timeout_s): rank 1 (host a" in str(error)
    assert "rank 2 (host a, pid 102) is in update, in all_reduce()" in str(error)


def test_a_death_between_two_calls_names_the_call_before_it() -> None:
    group = RemoteGroup(Script([Arrival(2, 0, "done")], [died(2)]), 30.0)
    assert group.call("generate", ranks=[2], stage="generation") == ["done"]
    with pytest.raises(WorkerError, match=r"rank 2 .* died in an idle moment after generation: its process is gone"):
        group.start("update", ranks=[0], stage="the update")


def test_a_deadline_that_no_key_sets_names_none() -> None:
    group = RemoteGroup(Script(), 30.0)
    with pytest.raises(WorkerError, match=r"joining the process group has taken longer than 0\.1 s: rank 0 ") as found:
        group.prepare(dummy_worker.make, None, 0.1)
    assert "worker_timeout_s" not in str(found.value)


def test_a_failure_elsewhere_ends_the_wait_for_another_call() -> None:
    group = RemoteGroup(Script([], [died(2)]), 30.0)
    generation = group.start("generate", ranks=[2], stage="generation")
    with pytest.raises(WorkerError, match=r"rank 2 .* died in generation"):
        group.call("update", ranks=[0, 1], stage="update")
    with pytest.raises(WorkerError):
        generation.done()


def test_results_come_in_the_order_of_the_ranks_and_a_polite_end_follows() -> None:
    channel = Script([Arrival(2, 0, "c")], [Arrival(0, 0, "a")])
    group = RemoteGroup(channel, 30.0)
    assert group.start_each("who", [(1,), (2,)], ranks=[2, 0]).result() == ["c", "a"]
    assert [(rank, call.args) for rank, call in channel.sent] == [(2, (1,)), (0, (2,))]
    group.close()
    group.close()
    assert channel.ended == [True]


def test_versions_that_differ_are_named_with_their_rank() -> None:
    own = versions()
    check_versions(own, INFOS, [own] * 3)
    driver = replace(own, torch="2.13.0+cpu", triton="none")
    found = [replace(own, torch="2.13.0+cu130")] * 3
    check_versions(driver, INFOS, found)
    with pytest.raises(ClusterError, match=r"rank 1 .*triton 0.1, rank 0 .*install the same on every node"):
        check_versions(driver, INFOS, [found[0], replace(found[0], triton="0.1"), found[0]])
    with pytest.raises(ClusterError, match=r"rank 0 .*torch 2.12.0, the driver 2.13.0"):
        check_versions(driver, INFOS, [replace(own, torch="2.12.0+cu130")] * 3)
    with pytest.raises(ClusterError, match=r"rank 2 .*vexact 9 \(source 0\), the driver 0"):
        check_versions(own, INFOS, [own, own, replace(own, vexact="9 (source 0)")])


def test_a_failure_keeps_what_the_error_held() -> None:
    failure = failed(1, FileNotFoundError(2, "No such file", "model")).failure
    assert failure is not None
    error: Any = error_of(pickle.loads(pickle.dumps(failure)), INFOS[1], "set-up")
    assert (type(error), error.filename, error.errno) == (FileNotFoundError, "model", 2)


def test_a_signal_that_ends_the_process_before_the_failure_is_told_leaves_word_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("_note", "step 2 is saved"), ("_cause", ""), ("_is_said", False)):
        monkeypatch.setattr(f"vexact.interrupt.{name}", value)
    error = error_after([died(1)])
    assert interrupt.message() == f"\ninterrupted; {error}; step 2 is saved\n"


def test_a_second_signal_while_the_first_is_heeded_still_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(Script):
        def lost(self, timeout_s: float) -> list[Failure]:
            raise KeyboardInterrupt

    channel = Impatient()
    group = RemoteGroup(channel, 30.0)
    monkeypatch.setattr("vexact.interrupt._requested", True)
    with pytest.raises(KeyboardInterrupt):
        group.close()
    assert len(channel.ended) == 1
