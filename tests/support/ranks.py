"""Ranks of one machine as processes of their own, which tests are the parents of."""

from __future__ import annotations

import faulthandler
import warnings
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

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


def _traced(rank: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()
    run(rank, *arguments)
