"""The checksums of all whole parameters of a model, each rank reading only what it holds."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from vexact.weights.fingerprint import checksums
from vexact.weights.manifest import TensorSpec, shard_mesh


def named_checksums(model: nn.Module) -> dict[str, int]:
    """By name, the same on any number of ranks. All ranks that share the parameters call it together.

    The host waits for the device once. Raises ValueError for parameters that are shared other than by rows.
    """
    mesh = shard_mesh(model)
    rank, num_ranks = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
    names, rows, offsets = [], [], []
    for name, parameter in model.named_parameters():
        names.append(name)
        rows.append(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
        offsets.append(TensorSpec(name, tuple(parameter.shape), parameter.dtype).part(rank, num_ranks)[0])
    sums = checksums(rows, offsets)
    if mesh is not None:
        dist.all_reduce(sums, group=mesh.get_group())
    return dict(zip(names, sums.tolist(), strict=True))
