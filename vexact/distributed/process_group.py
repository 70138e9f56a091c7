"""The default process group of a run's workers."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from vexact.distributed.layout import RankInfo

MARGIN_S = 60.0  # by which a collective outlives the deadline of a call: the driver notices first, and names the rank


def serve_store(host: str, timeout_s: float) -> tuple[Any, int]:
    """A rendezvous store on a free port of this machine, and that port.

    Raises:
        ClusterError: no port can be had.
    """
    from torch.distributed import TCPStore

    store = TCPStore(host, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
    return store, store.port


def reach_store(host: str, port: int, timeout_s: float) -> Any:
    """The store that ``serve_store`` opened on another rank."""
    from torch.distributed import TCPStore

    return TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)


def join_process_group(info: RankInfo, store: Any, timeout_s: float) -> None:
    """Makes the default group, Gloo and on GPUs also NCCL, and sends one number round, so that a link that is broken
    shows before any model is read.

    Args:
        timeout_s: seconds until a collective counts as hung.
    """
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if info.device != "cpu":
        torch.cuda.set_device(info.device)
        backend = "cpu:gloo,cuda:nccl"
    limit = _limit(timeout_s)
    dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size, timeout=limit)
    one = torch.ones(1, device=info.device)
    dist.all_reduce(one)
    assert one.item() == info.world_size


def new_group(ranks: Sequence[int], timeout_s: float) -> Any:
    """A group of some ranks of the default group, all of which call this together.

    Args:
        timeout_s: as for ``join_process_group``. A group of its own would wait as long as PyTorch thinks fit: a rank
            that waits for one that hangs would end itself before the driver has looked for the one to blame.
    """
    import torch.distributed as dist

    return dist.new_group(list(ranks), timeout=_limit(timeout_s))


def leave_process_group() -> None:
    """Ends the default group if there is one, and what is left of others. All ranks call it.

    A group's threads end with its last reference. One of them that wants the interpreter while that ends would abort
    the process of a run that is done, so groups that wait for the garbage collector go now, frozen ones too.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        gc.unfreeze()
        gc.collect()


def _limit(timeout_s: float) -> timedelta:
    return timedelta(seconds=timeout_s + MARGIN_S)
