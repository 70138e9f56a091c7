"""AdamW with clipping, a learning-rate schedule and a guard against non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from vexact.training.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """The optimizer of one model. Its schedule is a pure function of a step number that the caller keeps."""

    def __init__(self, parameters: Iterable[Parameter], config: OptimConfig) -> None:
        self.config = config
        self.parameters: Sequence[Parameter] = [p for p in parameters if p.requires_grad]
        self._adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr

    def step(self, max_norm: float) -> float:
        """Clips to ``max_norm``, steps, and returns the norm before clipping.

        Nothing changes when the norm is not finite: one bad batch must not destroy weights and moments.
        """
        norm = total_norm(self.parameters)
        if not math.isfinite(norm):
            return norm
        torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, torch.tensor(norm))
        self._adamw.step()
        return norm

    def state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        """AdamW's moments and step of one parameter; empty before the first step."""
        return self._adamw.state.get(parameter, {})

    def restore(self, parameter: Parameter, moments: dict[str, Tensor], num_steps: float) -> None:
        """Puts full moments (any device) and the step count back in the layout and place AdamW keeps them."""
        state: dict[str, Any] = {name: like(moments[name], parameter) for name in MOMENTS}
        state["step"] = torch.tensor(num_steps, dtype=torch.float32, device=parameter.device)
        self._adamw.state[parameter] = state

    def forget(self) -> None:
        """Back to the state before the first step."""
        self._adamw.state.clear()


def total_norm(parameters: Iterable[Parameter]) -> float:
    """The 2-norm of all gradients over all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``full`` laid out as ``parameter``: same device, dtype and sharding.

    With a sharded parameter all ranks call it together and rank 0's values are the ones that count.
    """
    tensor = full.to(parameter.device, parameter.dtype, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def unsharded(tensor: Tensor) -> Tensor:
    """The whole tensor: gathered from all ranks when sharded, itself otherwise."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
