"""AdamW with clipping, a learning-rate schedule and a guard against non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from vexact.training.config import OptimConfig
from vexact.training.optim.adamw import adamw_step
from vexact.training.optim.host_memory import host_rows
from vexact.training.optim.norm import total_norm
from vexact.training.optim.offload import stream
from vexact.training.parallel.ranks import Ranks, local

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True, eq=False)
class Moments:
    """AdamW's state of one parameter: this rank's rows of the two moments, and how many steps it has taken."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    num_steps: int = 0


class Optimizer:
    """The optimizer of one model. Its schedule is a pure function of a step number that the caller keeps.

    No bit depends on how parameters are sharded, nor on ``offload``, which keeps the moments in pinned host memory and
    passes them through the device in pieces during a step.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        config: OptimConfig,
        ranks: Ranks | None = None,
        offload: bool = False,
    ) -> None:
        self.config, self.lr, self.offload = config, config.lr, offload
        self.parameters: Sequence[Parameter] = [p for p in parameters if p.requires_grad]
        self._ranks = Ranks(None, self.parameters[0].device) if ranks is None else ranks
        self._moments: dict[Parameter, Moments] = {}
        self._host: dict[Parameter, tuple[Tensor, Tensor]] = {}  # memory of offloaded moments
        self._untouched: set[Parameter] = set()  # parameters whose memory there holds zeros
        self._seen: list[Tensor] = []  # extremes of the second moments that the last step has streamed

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clips to ``max_norm``, steps, and returns the norm before clipping. All ranks call it together.

        Nothing changes when the norm is not finite: one bad batch must not destroy weights and moments.
        """
        moving = [(p, p.grad) for p in self.parameters if p.grad is not None]
        norm = total_norm([gradient for _, gradient in moving], self._ranks)
        if not math.isfinite(norm):
            return norm
        gradients = [local(gradient) for _, gradient in moving]
        factor = (max_norm / (torch.tensor(norm, dtype=torch.float32) + 1e-6)).item()
        if factor < 1:
            torch._foreach_mul_(gradients, factor)
        groups: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        for (parameter, _), gradient in zip(moving, gradients, strict=True):
            moments = self._begin(parameter)
            moments.num_steps += 1
            tensors = local(parameter), gradient, moments.exp_avg, moments.exp_avg_sq
            if gradient.numel():
                flat = (tensors[0].view(-1), gradient.reshape(-1), tensors[2].view(-1), tensors[3].view(-1))
                groups.setdefault(moments.num_steps, []).append(flat)
        self._seen = []
        for num_steps, group in groups.items():
            if self.offload:
                self._seen += stream(group, partial(self._apply, num_steps))
            else:
                self._apply(num_steps, *map(list, zip(*group, strict=True)))
        return norm

    def _apply(self, num_steps: int, *tensors: list[Tensor]) -> None:
        weights, gradients, first, second = tensors
        adamw_step(weights, gradients, first, second, num_steps, self.lr, self.config)

    def state_of(self, parameter: Parameter) -> Moments | None:
        """AdamW's state of one parameter, None before its first step."""
        return self._moments.get(parameter)

    def second_moments(self) -> Iterator[Tensor]:
        """Tensors on the device that are finite just if all second moments are: offloaded ones are not read again."""
        if self.offload:
            yield from self._seen
        else:
            yield from (moments.exp_avg_sq for moments in self._moments.values())

    def blank_moments(self, parameters: Sequence[Parameter]) -> list[tuple[Tensor, Tensor]]:
        """Host memory for this rank's rows of both moments of each, to be read into and given to ``restore``.

        Before the first step it is the one that offloaded moments will have: there is no second copy of them then.
        """
        stays = {p: self._room(p) for p in parameters if self.offload and p not in self._moments}
        others = [p for p in parameters if p not in stays]
        rows = host_rows([local(p) for p in others for _ in MOMENTS], pinned=False)
        blank = stays | dict(zip(others, zip(rows[::2], rows[1::2], strict=True), strict=True))
        return [blank[p] for p in parameters]

    def restore(self, parameter: Parameter, exp_avg: Tensor, exp_avg_sq: Tensor, num_steps: int) -> None:
        """Takes this rank's rows of the moments (any device) and the step count: copies, or what ``blank_moments``
        gave."""
        moments = self._moments.get(parameter) or Moments(*self._room(parameter))
        for held, given in ((moments.exp_avg, exp_avg), (moments.exp_avg_sq, exp_avg_sq)):
            if held.data_ptr() != given.data_ptr():
                held.copy_(given)
        moments.num_steps = num_steps
        self._moments[parameter] = moments

    def forget(self) -> None:
        """Back to the state before the first step."""
        self._moments.clear()
        self._seen = []

    def _begin(self, parameter: Parameter) -> Moments:
        if parameter not in self._moments:
            self._moments[parameter] = self._blank(parameter)
        return self._moments[parameter]

    def _blank(self, parameter: Parameter) -> Moments:
        if self.offload:
            self._reserve(parameter)
        is_zero = parameter in self._untouched
        first, second = self._room(parameter)
        return Moments(first, second) if is_zero else Moments(first.zero_(), second.zero_())

    def _room(self, parameter: Parameter) -> tuple[Tensor, Tensor]:
        """For both moments, of unknown values."""
        if not self.offload:
            return torch.empty_like(local(parameter)), torch.empty_like(local(parameter))
        self._reserve(parameter)
        self._untouched.discard(parameter)
        return self._host[parameter]

    def _reserve(self, parameter: Parameter) -> None:
        """Memory on the host for a parameter: for all at once, and for as long as there is an optimizer."""
        if parameter in self._host:
            return
        new = [each for each in dict.fromkeys((*self.parameters, parameter)) if each not in self._host]
        rows = host_rows([local(each) for each in new for _ in MOMENTS])
        self._host |= dict(zip(new, zip(rows[::2], rows[1::2], strict=True), strict=True))
        self._untouched.update(new)


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``full`` laid out as ``parameter``: same device, dtype and sharding.

    With a sharded parameter all ranks call it together and rank 0's values are the ones that count.
    """
    tensor = full.to(parameter.device, parameter.dtype, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
