"""What is sent: the tensors in order, and the rows of each that every rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vexact.models import parameter_dtype


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One whole tensor as it arrives."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def part(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """[begin, end) of the elements that ``rank`` holds: rows, cut as ``torch.chunk`` and FSDP2 do."""
        rows = self.shape[0] if self.shape else 1
        row, chunk = self.numel // max(1, rows), -(-rows // num_ranks)
        return min(rows, rank * chunk) * row, min(rows, (rank + 1) * chunk) * row

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {str(self.dtype).removeprefix('torch.')}"


Manifest = tuple[TensorSpec, ...]


def manifest(model: nn.Module, dtype: torch.dtype) -> Manifest:
    """The parameters of ``model``, sharded or not, as they are in a model of ``dtype``."""
    return tuple(TensorSpec(name, tuple(p.shape), parameter_dtype(name, dtype)) for name, p in model.named_parameters())


def shard_mesh(model: nn.Module) -> DeviceMesh | None:
    """The ranks that share every parameter; None when each has all of them.

    Raises ValueError if the parameters are not shared alike, by rows, over a mesh of one dimension.
    """
    meshes = {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in model.parameters()}
    if len(meshes) != 1:
        raise ValueError(f"the model's parameters are shared by different ranks: {sorted(map(str, meshes))}")
    mesh = meshes.pop()
    if mesh is None or mesh.size() == 1:
        return None
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)  # all are, of one mesh
        if tuple(parameter.placements) != (Shard(0),):
            raise ValueError(
                f"{name} is laid out as {parameter.placements} over {mesh}; only rows are known, (Shard(0),)"
            )
    return mesh


class Fit:
    """Whether tensors that arrive one by one take the place of all ``parameters``, each exactly once."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._missing = set(parameters)
        self._problems: list[str] = []

    def admit(self, spec: TensorSpec) -> Tensor | None:
        """The parameter that the tensor is for; None, and a problem more, if it does not fit."""
        parameter, before = self._parameters.get(spec.name), len(self._problems)
        if parameter is None:
            self._problems.append(f"unknown name {spec.name!r}")
        elif spec.name not in self._missing:
            self._problems.append(f"{spec.name!r} given twice")
        elif spec.shape != tuple(parameter.shape):
            self._problems.append(f"{spec.name!r} has shape {spec.shape}, expected {tuple(parameter.shape)}")
        elif spec.dtype != parameter.dtype:
            self._problems.append(f"{spec.name!r} is {spec.dtype}, expected {parameter.dtype}")
        self._missing.discard(spec.name)
        return parameter if len(self._problems) == before else None

    def require_all(self) -> None:
        """Raises ValueError listing every problem there was, and what never came."""
        problems = self._problems + [f"missing {name!r}" for name in sorted(self._missing)]
        if problems:
            raise ValueError("weight update does not match the model: " + "; ".join(problems))
