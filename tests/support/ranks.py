"""Ranks of one machine as processes of their own, which tests are the parents of."""

from __future__ import annotations

import faulthandler
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vexact.distributed.process_group import leave_process_group

NATIVE = ("SIGSEGV", "SIGABRT")


def spawn(run: Callable[..., None], num_ranks: int, prepare: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """``run(rank, *prepare())`` in ``num_ranks`` processes, to their end; returns what ``prepare`` gave.

    Begins once more, with what ``prepare`` then gives, where native code ended a process. Threads of Gloo let go of
    tensors while Python does (pytorch issue 190489), and one start in some thousands has crashed of it. On a CPU
    nothing of this project is native code, so no fault of its own is let pass.

    Raises:
        ProcessRaisedException, ProcessExitedException: as ``torch.multiprocessing.spawn``.
    """
    arguments = prepare()
    try:
        mp.spawn(_traced, args=(run, arguments), nprocs=num_ranks, join=True)
    except mp.ProcessExitedException as error:
        if error.signal_name not in NATIVE:
            raise
        warnings.warn(f"{run.__name__}: {error}; once more", stacklevel=2)
        arguments = prepare()
        mp.spawn(_traced, args=(run, arguments), nprocs=num_ranks, join=True)
    return arguments


@contextmanager
def process_group(rank: int, num_ranks: int, directory: str, backend: str = "gloo") -> Iterator[None]:
    """The default group of ranks that meet in ``directory``, one thread each."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), num_ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    try:
        yield
    finally:
        leave_process_group()


def _traced(rank: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()
    run(rank, *arguments)
