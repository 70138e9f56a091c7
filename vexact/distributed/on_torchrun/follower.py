"""A rank other than 0: does what rank 0 asks for until rank 0 ends it or has gone."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from vexact import interrupt
from vexact.distributed.host import WorkerHost, hello, prepare_process
from vexact.distributed.layout import RankInfo
from vexact.distributed.on_torchrun.logs import ToRank0
from vexact.distributed.on_torchrun.meeting import find_driver, open_store
from vexact.env import TorchrunRank


def serve(launched: TorchrunRank) -> int:
    """The life of the process; returns its exit code: 0 when rank 0 has ended it, 1 when rank 0 has gone.

    Rank 0 tells of everything that goes wrong, here too; only that it is not to be found is said here.

    Raises:
        ClusterError: nobody answers where rank 0 should be.
    """
    _leave_signals_to_rank_0(signal.SIG_DFL)
    store = open_store(launched)
    connection = find_driver(store, launched)
    if connection is None:
        return 1
    _leave_signals_to_rank_0(signal.SIG_IGN)
    try:
        return _Follower(connection, store, launched).run()
    except (EOFError, OSError):  # before there is a worker
        return 1


class _Follower:
    def __init__(self, connection: Connection, store: Any, launched: TorchrunRank) -> None:
        self._connection, self._store, self._launched = connection, store, launched
        self._calls: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._host: WorkerHost | None = None

    def run(self) -> int:
        greeting = pickle.loads(self._connection.recv_bytes())
        if greeting is None:  # there is nothing to do
            return 0
        device, level = greeting
        prepare_process(level, self._launched.rank)
        to_rank_0 = ToRank0(lambda line: self._send(pickle.dumps(("say", line))))
        logging.basicConfig(handlers=[to_rank_0], format="%(message)s", force=True)
        self._send(pickle.dumps(hello(device)))
        info: RankInfo = pickle.loads(self._connection.recv_bytes())
        self._host = WorkerHost(info, self._store)
        threading.Thread(target=self._read, daemon=True).start()
        while (item := self._calls.get()) is not None:
            ticket, call = item
            value, failure = self._host.run(call)
            self._send(pickle.dumps((ticket, failure)), value)
        self._host.close()
        return 0

    def _read(self) -> None:
        """Takes messages while the other thread works; ends the process with rank 0."""
        try:
            while True:
                kind, ticket = pickle.loads(self._connection.recv_bytes())
                if kind == "call":
                    self._calls.put((ticket, self._connection.recv_bytes()))
                elif kind == "where":
                    assert self._host is not None
                    self._send(pickle.dumps(("where", (ticket, self._host.where()))))
                elif kind == "close":
                    self._calls.put(None)
                else:
                    os._exit(0)  # "end": a worker may be stuck, and rank 0 has said why
        except (EOFError, OSError):
            os._exit(1)

    def _send(self, head: bytes, body: bytes | None = None) -> None:
        with self._sending, suppress(OSError):  # rank 0 has gone: the reading thread sees it
            self._connection.send_bytes(head)
            if body is not None:
                self._connection.send_bytes(body)


def _leave_signals_to_rank_0(action: signal.Handlers) -> None:
    """Signals that a launcher or a terminal sends to all ranks: what becomes of the run is up to rank 0."""
    if threading.current_thread() is threading.main_thread():
        for number in interrupt.SIGNALS:
            signal.signal(number, action)
