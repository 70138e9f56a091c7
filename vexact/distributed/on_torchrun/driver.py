"""Rank 0 of torchrun: the driver's calls of the other ranks, and of worker 0 in a thread of its own."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from vexact import interrupt
from vexact.distributed.failure import Failure
from vexact.distributed.host import Call, WorkerHost
from vexact.distributed.layout import RankInfo
from vexact.distributed.on_torchrun.agent import has_lost_agent
from vexact.distributed.on_torchrun.logs import OfAllRanks
from vexact.distributed.remote import Arrival, Channel

CLOSE_S = 30.0  # for workers to close, when all is well
END_S = 2.0  # for processes to end when they are told to
POLL_S = 0.02
BUSY = 3  # times as long is waited for news that have come and that no thread has read: the machine is busy
GONE = "its process is gone (killed, for instance by the kernel for want of memory, or crashed in native code)"


class TorchrunChannel(Channel):
    """Every follower has a thread that reads from it and one that writes to it: one that is stopped holds up nobody.

    Args:
        host: of worker 0.
        connections: to the ranks 1 …, in order.
    """

    def __init__(self, infos: Sequence[RankInfo], host: WorkerHost, connections: Sequence[Connection]) -> None:
        self.infos = tuple(infos)
        self._host = host
        self._arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._own: queue.SimpleQueue[tuple[int, Call] | None] = queue.SimpleQueue()
        self._outgoing: dict[int, queue.SimpleQueue[list[bytes]]] = {}
        self._places: dict[tuple[int, int], str] = {}
        self._asked = 0
        self._connections = dict(enumerate(connections, start=1))
        self._lost: dict[int, Failure] = {}  # an interrupt may drop what ``receive`` has taken out of the queue
        self._gone = {rank: threading.Event() for rank in range(len(self.infos))}
        self._is_ended = False
        self._said = OfAllRanks()
        self._worker = threading.Thread(target=self._work, name="worker 0", daemon=True)
        self._worker.start()
        for rank, connection in self._connections.items():
            self._outgoing[rank] = queue.SimpleQueue()
            for target in (self._read, self._write):
                threading.Thread(target=target, args=(rank, connection), daemon=True).start()

    def send(self, ticket: int, ranks: Sequence[int], calls: Sequence[Call]) -> None:
        packed: dict[int, bytes] = {}
        for rank, call in zip(ranks, calls, strict=True):
            if rank > 0 and id(call) not in packed:
                packed[id(call)] = pickle.dumps(call, protocol=pickle.HIGHEST_PROTOCOL)
        for rank, call in zip(ranks, calls, strict=True):
            if rank == 0:
                self._own.put((ticket, call))
            else:
                self._outgoing[rank].put([pickle.dumps(("call", ticket)), packed[id(call)]])

    def receive(self, timeout_s: float) -> list[Arrival]:
        arrivals = []
        with suppress(queue.Empty):
            arrivals.append(self._arrived.get(timeout=timeout_s) if timeout_s > 0 else self._arrived.get_nowait())
            while True:
                arrivals.append(self._arrived.get_nowait())
        return arrivals

    def where(self, ranks: Sequence[int], timeout_s: float) -> Mapping[int, str]:
        self._asked += 1
        for rank in ranks:
            if rank == 0:
                self._places[0, self._asked] = self._host.where()
            else:
                self._outgoing[rank].put([pickle.dumps(("where", self._asked))])
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and any((rank, self._asked) not in self._places for rank in ranks):
            time.sleep(POLL_S)
        return {rank: self._places[rank, self._asked] for rank in ranks if (rank, self._asked) in self._places}

    def lost(self, timeout_s: float) -> list[Failure]:
        start = time.monotonic()
        while not self._lost:
            if time.monotonic() - start >= timeout_s * (BUSY if self._has_unread() else 1):
                break
            time.sleep(POLL_S)
        return list(self._lost.values())

    def end(self, politely: bool) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        if not politely and threading.current_thread() is threading.main_thread():
            # torchrun ends us as soon as it sees that we ended a rank that hangs; what went wrong must be said first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for outgoing in self._outgoing.values():
            outgoing.put([pickle.dumps(("close" if politely else "end", 0))])
        if politely:
            self._own.put(None)
        self._wait(CLOSE_S if politely else END_S)
        for rank, info in enumerate(self.infos):
            if rank > 0 and not self._gone[rank].is_set() and info.host == socket.gethostname():
                with suppress(OSError):
                    os.kill(info.pid, signal.SIGKILL)
        self._wait(END_S)
        if self._worker.is_alive():
            self._own.put(None)
            self._worker.join(END_S)
        self._said.close()

    def _has_unread(self) -> bool:
        return bool(wait([each for rank, each in self._connections.items() if not self._gone[rank].is_set()], 0.0))

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for rank in self._outgoing:
            self._gone[rank].wait(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        """Worker 0's thread."""
        while (item := self._own.get()) is not None:
            ticket, call = item
            value, failure = self._host.run(call)
            self._arrived.put(Arrival(0, ticket, value, failure))
        with suppress(Exception):
            self._host.close()

    def _read(self, rank: int, connection: Connection) -> None:
        try:
            while True:
                ticket, news = pickle.loads(connection.recv_bytes())
                if ticket == "say":
                    self._said.relay(rank, *news)
                    continue
                if ticket == "where":
                    asked, place = news
                    self._places[rank, asked] = place
                    continue
                value = None if news is not None else pickle.loads(connection.recv_bytes())
                self._arrived.put(Arrival(rank, ticket, value, news))
        except (EOFError, OSError):
            if not (self._is_ended or has_lost_agent()):
                failure = Failure(rank, "died", GONE)
                self._lost[rank] = failure
                interrupt.cause(f"{self.infos[rank]} died: {GONE}")
                self._arrived.put(Arrival(rank, None, failure=failure))
            self._gone[rank].set()

    def _write(self, rank: int, connection: Connection) -> None:
        with suppress(OSError):  # the other end has gone: the reading thread says so
            while True:
                for message in self._outgoing[rank].get():
                    connection.send_bytes(message)
