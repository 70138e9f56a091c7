"""How many processes a run has, on what, and who one of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Transport = Literal["local", "ray", "torchrun"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The processes that a run asks for; ``resolve_layout`` fills in what is left open.

    Attributes:
        nnodes: machines.
        n_gpus_per_node: processes on each, one per GPU; None takes every visible GPU, and one process on a CPU.
        device: "auto" takes GPUs if there are any, in the cluster if one is joined.
        ray_address: "host:port" of a Ray cluster to join, "auto" for the one that runs on this machine, "local" for a
            new one; None joins the cluster of RAY_ADDRESS, and starts a new one without.
        transport: how the processes are reached.
    """

    nnodes: int = 1
    n_gpus_per_node: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ray_address: str | None = None
    transport: Transport | None = None

    @property
    def world_size(self) -> int:
        """Processes in all, of a layout that is resolved."""
        assert self.n_gpus_per_node is not None, "resolve_layout() fills it in"
        return self.nnodes * self.n_gpus_per_node


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One worker process.

    Attributes:
        rank: 0 … world_size - 1, counted node by node; the rank in the default process group.
        local_rank: 0 … among the ranks of its node.
        node: 0 … nnodes - 1.
        host: the machine's name.
        pid: of the worker's process.
        device: "cpu" or "cuda:N", with N as the process itself counts its GPUs.
    """

    rank: int
    world_size: int
    local_rank: int
    node: int
    host: str
    pid: int
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"
