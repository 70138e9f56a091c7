"""Ranks that torchrun started: rank 0 is the driver and worker 0, the others serve it."""

from vexact.distributed.on_torchrun.follower import serve
from vexact.distributed.on_torchrun.start import dismiss_ranks, start_ranks

__all__ = ["dismiss_ranks", "serve", "start_ranks"]
