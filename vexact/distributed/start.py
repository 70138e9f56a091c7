"""From a layout to running workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

from vexact import env
from vexact.distributed.errors import ClusterError
from vexact.distributed.group import WorkerGroup
from vexact.distributed.layout import Layout, RankInfo, Transport
from vexact.distributed.local import LocalGroup
from vexact.distributed.on_torchrun.agent import watch_agent

START_S = 300.0  # for all processes to be there
DISMISS_S = 10.0  # of that, when there is an error to tell


def resolve_layout(layout: Layout) -> Layout:
    """The layout with its number of processes, device and transport decided; joins the Ray cluster it names, if any.

    Raises:
        ValueError: more processes than the machine has GPUs, or settings that contradict each other.
        ClusterError: Ray is needed and not installed, or the cluster does not answer.
    """
    if layout.transport is not None:
        return layout
    launched = env.torchrun_rank()
    if launched is not None:
        return _of_torchrun(layout, launched)
    if layout.ray_address not in (None, "local") or (env.ray_address() not in ("", "local") and not layout.ray_address):
        return _of_cluster(layout)
    if layout.nnodes > 1:
        raise ValueError(
            f"trainer.nnodes={layout.nnodes} needs a Ray cluster, or torchrun on every node: use `ray job submit` "
            "(examples/multinode/ray_job.sh), set trainer.ray_address, or start with torchrun"
        )
    return _of_machine(layout)


def _of_machine(layout: Layout) -> Layout:
    device, available = _device(layout.device), _num_gpus()
    wanted = layout.n_gpus_per_node
    if device == "cuda" and available < (wanted or 1):
        raise ValueError(
            f"trainer.n_gpus_per_node={wanted or 'null'} with device=cuda: PyTorch sees {available} GPU(s) on this "
            "machine (CUDA_VISIBLE_DEVICES hides others); lower it, leave it out for all, or use device=cpu"
        )
    if wanted is None:
        wanted = available if device == "cuda" else 1
    transport: Transport = "ray" if wanted > 1 else "local"
    return replace(layout, device=device, n_gpus_per_node=wanted, transport=transport)


def _of_cluster(layout: Layout) -> Layout:
    from vexact.distributed.on_ray import connect

    nodes = connect(layout.ray_address, 0, 0).nodes()
    device = layout.device
    if device == "auto":
        device = "cuda" if any(node.num_gpus for node in nodes) else "cpu"
    wanted = layout.n_gpus_per_node
    if wanted is None and device == "cpu":
        wanted = 1
    if wanted is None:
        chosen = [node.num_gpus for node in nodes[: layout.nnodes]]
        if len(chosen) < layout.nnodes or not min(chosen):
            found = ", ".join(f"{node.name} {node.num_gpus}" for node in nodes)
            raise ClusterError(
                f"trainer.nnodes={layout.nnodes}: the Ray cluster has not as many nodes with GPUs ({found}); start the "
                "others, or set trainer.n_gpus_per_node to wait for them"
            )
        wanted = min(chosen)
    return replace(layout, device=device, n_gpus_per_node=wanted, transport="ray")


def _of_torchrun(layout: Layout, launched: env.TorchrunRank) -> Layout:
    world_size, wanted = launched.world_size, layout.n_gpus_per_node
    if world_size % layout.nnodes or (wanted is not None and layout.nnodes * wanted != world_size):
        per_node = "" if wanted is None else f" times trainer.n_gpus_per_node={wanted}"
        raise ValueError(
            f"torchrun started {world_size} process(es), and that is not trainer.nnodes={layout.nnodes}{per_node}; "
            "leave these keys out"
        )
    transport: Transport = "torchrun" if world_size > 1 else "local"
    return replace(
        layout, device=_device(layout.device), n_gpus_per_node=world_size // layout.nnodes, transport=transport
    )


def _device(name: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if name != "auto":
        return name
    return "cuda" if _num_gpus() else "cpu"


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def start_workers(
    layout: Layout,
    factory: Callable[[RankInfo], Any],
    *,
    timeout_s: float = 1800.0,
    start_timeout_s: float = START_S,
) -> WorkerGroup:
    """Starts the processes of ``layout``, joins them in the default process group and makes a worker in each.

    Under torchrun only rank 0 returns; the others serve it until it ends, and then raise SystemExit.

    Args:
        layout: resolved or not.
        factory: makes the worker of one process; picklable. All ranks run it together, so it may communicate.
        timeout_s: deadline of a call that names none, in seconds; the factory has the longer of both.
        start_timeout_s: deadline of all that comes before the factory: places in the cluster, processes, group.

    Raises:
        ValueError, ClusterError: the processes cannot be had as asked for.
        WorkerError, Exception: what the factory met, as for a call.
    """
    layout = resolve_layout(layout)
    if layout.transport == "torchrun":
        from vexact.distributed.on_torchrun import start_ranks

        return start_ranks(layout, factory, timeout_s, start_timeout_s)
    if layout.transport == "ray":
        from vexact.distributed.on_ray import connect, start_actors

        num_gpus = layout.world_size if layout.device == "cuda" else 0
        cluster = connect(layout.ray_address, num_cpus=layout.world_size, num_gpus=num_gpus)
        return start_actors(cluster, layout, factory, timeout_s, start_timeout_s)
    return LocalGroup(factory, layout.device)


def serve_if_follower() -> int | None:
    """Under torchrun, on a rank other than 0: serves rank 0 until it ends, and returns the exit code. Else None.

    From here on no rank outlives the torchrun that started it.

    To be called before a command does or prints anything that only one process of a run should.
    """
    launched = env.torchrun_rank()
    if launched is None:
        return None
    watch_agent(launched)
    if launched.rank == 0:
        return None
    from vexact.distributed.on_torchrun import serve

    return serve(launched)


@contextmanager
def dismissing_followers() -> Iterator[None]:
    """Around what rank 0 does after ``serve_if_follower``: other ranks that it has not called are let go at the end. A
    launcher waits for them, and need not end them when rank 0 fails."""
    try:
        yield
    except Exception:
        with suppress(ClusterError):  # what went wrong first is to be told
            _dismiss_followers(DISMISS_S)
        raise
    _dismiss_followers(START_S)


def _dismiss_followers(timeout_s: float) -> None:
    launched = env.torchrun_rank()
    if launched is not None and launched.world_size > 1:
        from vexact.distributed.on_torchrun import dismiss_ranks

        dismiss_ranks(launched, timeout_s)
