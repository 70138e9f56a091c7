"""Worker processes, one per GPU: started by Ray or torchrun, called from one driver, joined in one process group."""

from vexact.distributed.errors import ClusterError, WorkerError
from vexact.distributed.group import Pending, WorkerGroup
from vexact.distributed.layout import Layout, RankInfo
from vexact.distributed.start import dismissing_followers, resolve_layout, serve_if_follower, start_workers

__all__ = [
    "ClusterError",
    "Layout",
    "Pending",
    "RankInfo",
    "WorkerError",
    "WorkerGroup",
    "dismissing_followers",
    "resolve_layout",
    "serve_if_follower",
    "start_workers",
]
