"""From a layout to a group of Ray actors."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from vexact import env
from vexact.distributed.errors import ClusterError
from vexact.distributed.layout import Layout, RankInfo
from vexact.distributed.on_ray import logs, placement
from vexact.distributed.on_ray.actor import RayWorker
from vexact.distributed.on_ray.channel import INSPECT, RayChannel
from vexact.distributed.on_ray.cluster import Cluster
from vexact.distributed.remote import RemoteGroup
from vexact.distributed.versions import check_versions, versions

log = logging.getLogger(__name__)


def start_actors(
    cluster: Cluster,
    layout: Layout,
    factory: Callable[[RankInfo], Any],
    timeout_s: float,
    start_timeout_s: float,
) -> RemoteGroup:
    """Places, starts and joins the actors of a resolved layout and makes their workers; see ``start_workers``.

    The cluster is closed with the group, and when the start fails.
    """
    deadline = time.monotonic() + start_timeout_s
    channel = None
    try:
        logs.take_over()
        places = placement.reserve(cluster, layout, start_timeout_s)
        channel = RayChannel(cluster, places)
        channel.actors = _actors(cluster, layout, places)
        left = max(1.0, deadline - time.monotonic())
        hellos = channel.ask("start-up", left, lambda _, actor: actor.hello.remote(layout.device))
        channel.infos = tuple(_infos(layout, hellos))
        check_versions(versions(), channel.infos, [said.versions for said, _, _ in hellos])
        channel.ask("start-up", left, lambda rank, actor: actor.become.remote(channel.infos[rank]))
        group = RemoteGroup(channel, timeout_s)
        group.prepare(factory, address=hellos[0][1], start_timeout_s=max(1.0, deadline - time.monotonic()))
    except BaseException:
        if channel is not None:
            channel.end(politely=False)
        cluster.close()
        raise
    return group


def _actors(cluster: Cluster, layout: Layout, places: list[Any]) -> list[Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    assert layout.n_gpus_per_node is not None
    run, level, folder = secrets.token_hex(4), logging.getLogger("vexact").getEffectiveLevel(), os.getcwd()
    kind = cluster.ray.remote(concurrency_groups={INSPECT: 1})(RayWorker)
    actors = []
    for rank in range(layout.world_size):
        node, local_rank = divmod(rank, layout.n_gpus_per_node)
        options: dict[str, Any] = {
            "name": f"vexact-{run}-rank-{rank}",
            "num_cpus": 1,
            "num_gpus": 1 if layout.device == "cuda" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(places[node], local_rank),
        }
        if not cluster.is_own:  # one of our own has inherited the environment
            options["runtime_env"] = {"env_vars": env.worker_environment()}
        actors.append(kind.options(**options).remote(rank, level, folder))
    return actors


def _infos(layout: Layout, hellos: list[Any]) -> list[RankInfo]:
    assert layout.n_gpus_per_node is not None
    infos = []
    for rank, (said, _, gpu) in enumerate(hellos):
        if layout.device == "cuda" and not said.num_gpus:
            raise ClusterError(
                f"rank {rank} has a GPU of {said.host} from Ray, but its PyTorch sees none; install a CUDA build there"
            )
        node, local_rank = divmod(rank, layout.n_gpus_per_node)
        device = "cpu" if layout.device == "cpu" else f"cuda:{gpu}"
        infos.append(RankInfo(rank, layout.world_size, local_rank, node, said.host, said.pid, device))
    return infos
