"""A place for every worker: one bundle each, node by node."""

from __future__ import annotations

import logging
import time
from typing import Any

from vexact import interrupt
from vexact.distributed.errors import ClusterError
from vexact.distributed.layout import Layout
from vexact.distributed.on_ray.cluster import Cluster, Node

log = logging.getLogger(__name__)
SAY_S = 15.0  # between two lines about what is missing
POLL_S = 0.5


def reserve(cluster: Cluster, layout: Layout, timeout_s: float) -> list[Any]:
    """One placement group per node, each with ``n_gpus_per_node`` bundles of that node.

    Raises:
        ClusterError: the cluster has not had room for all of them within ``timeout_s``; nothing stays reserved.
    """
    from ray.util.placement_group import placement_group

    assert layout.n_gpus_per_node is not None
    bundle = {"CPU": 1, "GPU": 1} if layout.device == "cuda" else {"CPU": 1}
    groups = [placement_group([bundle] * layout.n_gpus_per_node, strategy="STRICT_PACK") for _ in range(layout.nnodes)]
    start, said = time.monotonic(), 0.0
    try:
        waiting = list(groups)
        while waiting:
            interrupt.check()
            waited = time.monotonic() - start
            if waited > timeout_s:
                raise ClusterError(f"no room for the workers within {timeout_s:g} s: {shortage(cluster, layout)}")
            if waited > said:
                said = waited + SAY_S
                if waited > 2 * POLL_S:
                    log.info("waiting for %s (%.0f s of %g s)", shortage(cluster, layout), waited, timeout_s)
            if waiting[0].wait(POLL_S):
                waiting.pop(0)
    except BaseException:
        release(groups)
        raise
    return groups


def release(groups: list[Any]) -> None:
    """Gives the places back."""
    from ray.util.placement_group import remove_placement_group

    for group in groups:
        remove_placement_group(group)


def shortage(cluster: Cluster, layout: Layout) -> str:
    """What is wanted beside what there is, node by node."""
    kind = "GPU" if layout.device == "cuda" else "CPU"
    wanted = (
        f"{layout.nnodes} node(s) with {layout.n_gpus_per_node} free {kind}(s) each (trainer.nnodes, "
        "trainer.n_gpus_per_node)"
    )
    nodes = [_room(node, kind) for node in cluster.nodes()]
    free = int(cluster.ray.available_resources().get(kind, 0))
    return f"{wanted}; the cluster has {len(nodes)} node(s): {', '.join(nodes)}; {free} free in all"


def _room(node: Node, kind: str) -> str:
    if kind == "CPU":
        return f"{node.name} {node.num_cpus} CPU(s)"
    few = f" but {node.num_cpus} CPU(s), one for each is needed" if node.num_cpus < node.num_gpus else ""
    return f"{node.name} {node.num_gpus} GPU(s){few}"
