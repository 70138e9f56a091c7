"""From torchrun's processes to a group, on rank 0."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from vexact import env
from vexact.distributed.errors import ClusterError
from vexact.distributed.host import Hello, WorkerHost, hello
from vexact.distributed.layout import Layout, RankInfo
from vexact.distributed.on_torchrun.driver import TorchrunChannel
from vexact.distributed.on_torchrun.follower import serve
from vexact.distributed.on_torchrun.meeting import gather_followers, open_store
from vexact.distributed.remote import RemoteGroup
from vexact.distributed.versions import check_versions
from vexact.env import TorchrunRank

_has_called = False  # the other ranks, for a group


def start_ranks(
    layout: Layout, factory: Callable[[RankInfo], Any], timeout_s: float, start_timeout_s: float
) -> RemoteGroup:
    """The group of all ranks, on rank 0; any other rank serves it and then leaves by SystemExit. See
    ``start_workers``."""
    global _has_called
    launched = env.torchrun_rank()
    assert launched is not None
    if launched.rank > 0:
        raise SystemExit(serve(launched))
    _has_called = True
    deadline = time.monotonic() + start_timeout_s
    store = open_store(launched, start_timeout_s)
    found = gather_followers(store, launched, max(1.0, deadline - time.monotonic()))
    connections = [found[rank][0] for rank in sorted(found)]
    local_ranks = [launched.local_rank, *(found[rank][1] for rank in sorted(found))]
    greeting = pickle.dumps((layout.device, logging.getLogger("vexact").getEffectiveLevel()))
    for connection in connections:
        connection.send_bytes(greeting)
    own = hello(layout.device)
    hellos = [own, *(_answer(rank, found[rank][0], deadline) for rank in sorted(found))]
    infos = _infos(layout, hellos, local_ranks)
    check_versions(own.versions, infos, [said.versions for said in hellos])
    for info, connection in zip(infos[1:], connections, strict=True):
        connection.send_bytes(pickle.dumps(info))
    channel = TorchrunChannel(infos, WorkerHost(infos[0], store), connections)
    group = RemoteGroup(channel, timeout_s)
    try:
        with group.heeding():
            group.prepare(factory, address=None, start_timeout_s=max(1.0, deadline - time.monotonic()))
    except BaseException:
        channel.end(politely=False)
        raise
    return group


def dismiss_ranks(launched: TorchrunRank, timeout_s: float) -> None:
    """On rank 0, at the end of a command that needed no group: the others, which wait for it, end with code 0.

    Raises:
        ClusterError: some have not come within ``timeout_s``; they are named.
    """
    if not _has_called:
        for connection, _ in gather_followers(open_store(launched, timeout_s), launched, timeout_s).values():
            connection.send_bytes(pickle.dumps(None))


def _answer(rank: int, connection: Connection, deadline: float) -> Hello:
    try:
        if connection.poll(max(1.0, deadline - time.monotonic())):
            said: Hello = pickle.loads(connection.recv_bytes())
            return said
    except (EOFError, OSError):
        raise ClusterError(f"rank {rank} has gone during start-up") from None
    raise ClusterError(f"rank {rank} did not answer during start-up; is it stopped?")


def _infos(layout: Layout, hellos: list[Hello], local_ranks: list[int]) -> list[RankInfo]:
    hosts = list(dict.fromkeys(said.host for said in hellos))
    infos = []
    for rank, (said, local_rank) in enumerate(zip(hellos, local_ranks, strict=True)):
        if layout.device == "cuda" and local_rank >= said.num_gpus:
            raise ClusterError(
                f"rank {rank} is process {local_rank} (LOCAL_RANK) of {said.host}, which has {said.num_gpus} GPU(s); "
                f"start torchrun with --nproc-per-node={said.num_gpus}, or with trainer.device=cpu"
            )
        device = "cpu" if layout.device == "cpu" else f"cuda:{local_rank}"
        node = hosts.index(said.host)
        infos.append(RankInfo(rank, layout.world_size, local_rank, node, said.host, said.pid, device))
    return infos
