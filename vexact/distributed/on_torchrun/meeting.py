"""How the ranks meet: rank 0's address and a secret, in the store that torchrun names."""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import secrets
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from vexact import interrupt
from vexact.distributed.errors import ClusterError
from vexact.env import TorchrunRank

log = logging.getLogger(__name__)
ADDRESS = "driver"
STORE_S = 300.0  # for rank 0 to open the store
SAY_S = 15.0
POLL_S = 0.1


def open_store(launched: TorchrunRank, timeout_s: float = STORE_S) -> Any:
    """The store behind MASTER_ADDR and MASTER_PORT; rank 0 opens it unless torchrun's agent has.

    Raises:
        ClusterError: the port is in use, or nobody answers there.
    """
    import torch.distributed as dist

    place = f"MASTER_ADDR={launched.master_addr} MASTER_PORT={launched.master_port}"
    try:
        store = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s))))[0]
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise ClusterError(f"{place}: the port is in use on this machine; set MASTER_PORT to another one") from None
        raise ClusterError(
            f"{place}: rank {launched.rank} found no rank 0 there within {timeout_s:g} s; does it run, and can this "
            "machine reach it?"
        ) from error
    return dist.PrefixStore(f"vexact/{launched.attempt}", store)


def find_driver(store: Any, launched: TorchrunRank) -> Connection | None:
    """A follower's connection to rank 0; None if rank 0 has gone before: it has said why itself."""
    from torch.distributed import DistError

    try:
        while not store.check([ADDRESS]):
            interrupt.check()
            time.sleep(POLL_S)
        host, port, key = json.loads(store.get(ADDRESS))
        connection = Client((host, port), authkey=bytes.fromhex(key))
        _send_at_once(connection)
        connection.send_bytes(pickle.dumps((launched.rank, launched.local_rank)))
    except (DistError, EOFError, OSError):
        return None
    return connection


def gather_followers(store: Any, launched: TorchrunRank, timeout_s: float) -> dict[int, tuple[Connection, int]]:
    """Rank 0's connections to the others: rank to (connection, its local rank).

    Raises:
        ClusterError: some have not called within ``timeout_s``; they are named.
    """
    here = launched.master_addr in ("localhost", "127.0.0.1", "::1")
    key = secrets.token_bytes(32)
    listener = Listener(("127.0.0.1" if here else "0.0.0.0", 0), backlog=launched.world_size, authkey=key)
    port = listener.address[1]
    store.set(ADDRESS, json.dumps(["127.0.0.1" if here else launched.master_addr, port, key.hex()]))
    called: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    threading.Thread(target=_accept, args=(listener, called), daemon=True).start()
    found: dict[int, tuple[Connection, int]] = {}
    start = time.monotonic()
    said = SAY_S
    try:
        while len(found) < launched.world_size - 1:
            interrupt.check()
            with suppress(queue.Empty, EOFError, OSError):
                connection = called.get(timeout=POLL_S)
                _send_at_once(connection)
                rank, local_rank = pickle.loads(connection.recv_bytes())
                found[rank] = connection, local_rank
            waited = time.monotonic() - start
            absent = ", ".join(str(rank) for rank in range(1, launched.world_size) if rank not in found)
            if absent and waited > timeout_s:
                raise ClusterError(f"rank {absent} of {launched.world_size} did not come within {timeout_s:g} s")
            if absent and waited > said:
                said = waited + SAY_S
                log.info("waiting for rank %s of %d (%.0f s of %g s)", absent, launched.world_size, waited, timeout_s)
    finally:
        with suppress(OSError):
            listener.close()
    return found


def _send_at_once(connection: Connection) -> None:
    """Small messages do not wait for the answer to the last one (40 ms each)."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _accept(listener: Listener, called: queue.SimpleQueue[Connection]) -> None:
    while True:
        try:
            called.put(listener.accept())
        except (AuthenticationError, EOFError, ConnectionError):  # a stranger
            continue
        except OSError:  # closed
            return
