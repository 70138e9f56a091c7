"""Calls of Ray actors, and what Ray tells of those that die."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vexact import interrupt
from vexact.distributed.errors import WorkerError
from vexact.distributed.failure import Failure
from vexact.distributed.host import Call
from vexact.distributed.layout import RankInfo
from vexact.distributed.on_ray import placement
from vexact.distributed.on_ray.cluster import Cluster
from vexact.distributed.remote import POLL_S, Arrival, Channel

INSPECT = "inspect"  # the actors' threads that look at the one that works
CLOSE_S = 30.0  # for workers to close, when all is well
GONE_S = 10.0  # for their processes to be gone


class RayChannel(Channel):
    """One actor per rank, in places that are given back at the end. ``infos`` is there once they have said hello."""

    def __init__(self, cluster: Cluster, places: list[Any]) -> None:
        self.infos: tuple[RankInfo, ...] = ()
        self.actors: list[Any] = []
        self._cluster, self._ray, self._places = cluster, cluster.ray, places
        self._sent: dict[Any, tuple[int, int]] = {}
        self._is_ended = False

    def send(self, ticket: int, ranks: Sequence[int], calls: Sequence[Call]) -> None:
        packed = {id(call): pickle.dumps(call, protocol=pickle.HIGHEST_PROTOCOL) for call in calls}
        if len(packed) == 1 < len(calls):
            packed = {key: self._ray.put(data) for key, data in packed.items()}
        for rank, call in zip(ranks, calls, strict=True):
            self._sent[self.actors[rank].run.remote(packed[id(call)])] = (ticket, rank)

    def receive(self, timeout_s: float) -> list[Arrival]:
        if not self._sent:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(list(self._sent), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = self._ray.wait(list(self._sent), num_returns=len(self._sent), timeout=0)
        arrivals = []
        for ref in ready:
            ticket, rank = self._sent.pop(ref)
            answer, failure = self._get(rank, ref)
            if failure is None:
                answer, failure = answer
            value = pickle.loads(answer) if failure is None else None
            arrivals.append(Arrival(rank, ticket, value, failure))
        return arrivals

    def where(self, ranks: Sequence[int], timeout_s: float) -> Mapping[int, str]:
        asked = {self.actors[rank].where.options(concurrency_group=INSPECT).remote(): rank for rank in ranks}
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
        answers = {asked[ref]: self._get(asked[ref], ref) for ref in ready}
        return {rank: place for rank, (place, failure) in answers.items() if failure is None}

    def end(self, politely: bool) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        with suppress(Exception):
            if politely:
                refs = [actor.close.remote() for actor in self.actors]
                self._ray.wait(refs, num_returns=len(refs), timeout=CLOSE_S)
            for actor in self.actors:
                self._ray.kill(actor, no_restart=True)
            placement.release(self._places)
        _end_processes([info.pid for info in self.infos if info.host == socket.gethostname()])
        self._cluster.close()

    def ask(self, stage: str, timeout_s: float, question: Callable[[int, Any], Any]) -> list[Any]:
        """What every actor answers, before there is a group.

        Args:
            question: of (rank, actor), makes the reference of its answer.

        Raises:
            WorkerError: a process died, or did not answer in time.
        """
        refs = {question(rank, actor): rank for rank, actor in enumerate(self.actors)}
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(refs):
            interrupt.check()
            waiting = [ref for ref, rank in refs.items() if rank not in answers]
            if time.monotonic() > deadline:
                late = ", ".join(str(refs[ref]) for ref in waiting)
                raise WorkerError(f"no answer within {timeout_s:g} s from rank {late} in {stage}", None, stage)
            for ref in self._ray.wait(waiting, num_returns=1, timeout=POLL_S)[0]:
                rank = refs[ref]
                answers[rank], failure = self._get(rank, ref)
                if failure is not None:
                    raise WorkerError(f"rank {rank} failed in {stage}: {failure.summary}", rank, stage)
        return [answers[rank] for rank in sorted(answers)]

    def _get(self, rank: int, ref: Any) -> tuple[Any, Failure | None]:
        try:
            return self._ray.get(ref), None
        except self._ray.exceptions.RayTaskError as error:  # of the actor, outside the worker's own code
            return None, Failure(rank, "bug", str(error.cause or error).strip(), str(error))
        except self._ray.exceptions.RayError as error:
            return None, Failure(rank, "died", _how(self._ray, error))


def _how(ray: Any, error: Exception) -> str:
    """How a process died, of the page that Ray says about it."""
    text = str(error)
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in text:
        return "Ray ended it because its machine was almost out of memory"
    if "node" in text and ("node died" in text or "node was terminated" in text or "dead node" in text):
        return "its machine has left the cluster"
    for line in reversed(text.splitlines()):
        if line.strip().startswith(("ModuleNotFoundError", "ImportError")):
            return f"{line.strip()}; install the same on every node, or ship it with --runtime-env"
    return "its process is gone (killed, for instance by the kernel for want of memory, or crashed in native code)"


def _end_processes(pids: Sequence[int]) -> None:
    """Ends processes of this machine, stopped ones too, and waits until they are gone."""
    deadline = time.monotonic() + GONE_S
    for pid in pids:
        if _is_ray_worker(pid):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    while any(map(_is_ray_worker, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_ray_worker(pid: int) -> bool:
    """Whether the process lives and is still the one we knew: Ray names its workers so."""
    try:
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
