"""The training ranks as the actor sees them; with one rank every method is the identity."""

from __future__ import annotations

import atexit
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vexact.models import ModelConfig
from vexact.training.sequence_parallel import SequenceRanks, check_size


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank per process, ``mesh`` None for a lone process. Weights are sharded over all of them.

    Neighbours in a ``sequence`` compute each micro-batch together; without one every rank computes its own.
    """

    mesh: DeviceMesh | None
    device: torch.device
    sequence: SequenceRanks | None = None

    @classmethod
    def of_process(cls, device: torch.device) -> Ranks:
        """All ranks of the default process group, or this process alone when there is none."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            return cls(init_device_mesh(device.type, (dist.get_world_size(),)), device)
        return cls(None, device)

    def sharing(self, size: int, model: ModelConfig) -> Ranks:
        """These ranks, ``size`` of them to a micro-batch. All ranks call it together.

        Raises ValueError when ``size`` divides the ranks or the query heads of the model not evenly.
        """
        check_size(size, self.world_size, model.num_heads)
        if size == 1:
            return self
        assert self.mesh is not None, "a lone process shares with nobody"
        return replace(self, sequence=SequenceRanks.of_process(size, self.mesh.get_group()))

    @property
    def num_batches(self) -> int:
        """Micro-batches that are computed at once."""
        return self.world_size if self.sequence is None else self.world_size // self.sequence.size

    @property
    def reports(self) -> bool:
        """Whether this rank answers for the scores of its micro-batches: one of those that share them does."""
        return self.sequence is None or self.sequence.rank == 0

    @property
    def world_size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    def maximum(self, *values: int) -> list[int]:
        """Elementwise maximum over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def total(self, *values: int) -> list[int]:
        """Elementwise sum over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def total_of(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values, group=self.mesh.get_group())
        return values

    def _reduce(self, values: tuple[int, ...], op: dist.ReduceOp.RedOpType) -> list[int]:
        if self.mesh is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op, group=self.mesh.get_group())
        return tensor.tolist()


def lone_mesh(device: torch.device) -> DeviceMesh:
    """A mesh of this process only, starting a process group in memory when there is none: no port, no file."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(close_process_group)
    return init_device_mesh(device.type, (1,))


def close_process_group() -> None:
    """Ends the default process group if there is one; NCCL complains when a process exits without."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(root: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Wraps every layer and the root with FSDP2, in place.

    Parameters keep their dtype as the master copy, compute in ``dtype`` and reduce gradients in fp32. Inputs are never
    cast: temperatures and rotary tables stay fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
