"""From a layout to running workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vexact.distributed.group import WorkerGroup
from vexact.distributed.layout import Layout, RankInfo
from vexact.distributed.local import LocalGroup


def resolve_layout(layout: Layout) -> Layout:
    """The layout with its number of processes, device and transport decided; joins the Ray cluster it names, if any.

    Raises:
        ValueError: more processes than the machine has GPUs, or settings that contradict each other.
        ClusterError: Ray is needed and not installed, or the cluster does not answer.
    """
    return replace(layout, n_gpus_per_node=1, device="cpu", transport="local")


def start_workers(
    layout: Layout,
    factory: Callable[[RankInfo], Any],
    *,
    timeout_s: float = 1800.0,
    start_timeout_s: float = 300.0,
) -> WorkerGroup:
    """Starts the processes of ``layout``, joins them in the default process group and makes a worker in each.

    Under torchrun only rank 0 returns; the others serve it until it ends, and then raise SystemExit.

    Args:
        layout: resolved or not.
        factory: makes the worker of one process; picklable. All ranks run it together, so it may communicate.
        timeout_s: deadline of a call that names none, and of the factory, in seconds.
        start_timeout_s: deadline of all that comes before the factory: places in the cluster, processes, group.

    Raises:
        ValueError, ClusterError: the processes cannot be had as asked for.
        WorkerError, Exception: what the factory met, as for a call.
    """
    layout = resolve_layout(layout)
    return LocalGroup(factory, layout.device)


def serve_if_follower() -> int | None:
    """Under torchrun, on a rank other than 0: serves rank 0 until it ends, and returns the exit code. Else None.

    To be called before a command does or prints anything that only one process of a run should.
    """
    return None
