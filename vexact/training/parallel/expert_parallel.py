"""Experts that stay where they are: rows of tokens travel to them, and come home before they are added up.

All W ranks keep weights as FSDP2 would, rank r the experts r * ceil(E / W) and on. Of S groups of W/S neighbours each
computes with the experts of its own ranks, gathered among them, for tokens of all ranks.

No bit depends on S. A row of a grouped product knows no other rows, and a token's are added at home. The owner keeps
the rows of every rank together, one rank's behind another's, so that the gradient of a matrix comes in the pieces that
these ranks would have computed; they are added as ``gradient_sum`` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad

from vexact.models import ModelConfig
from vexact.models.layers.moe import Experts
from vexact.ops.dispatch import backend
from vexact.ops.moe import ExpertGroups
from vexact.training.parallel.ordered_sum import OrderedSum
from vexact.training.parallel.sequence_parallel import either
from vexact.training.parallel.subgroup import subgroup

KEY = "actor_rollout_ref.actor.fsdp_config.expert_parallel_size"
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13


def check_expert_size(size: int, num_ranks: int, model: ModelConfig) -> None:
    """
    Args:
        size: S, the groups of ranks that are to share the experts. num_ranks: those that train.

    Raises:
        ValueError: S > 1 and the model has no experts; or S does not divide both the ranks and the experts, or would
            leave a group without.
    """
    if size == 1:
        return
    if model.moe is None or not model.chooses_experts:
        raise ValueError(f"{KEY}={size}: {model.described} has no experts to share; set it to 1")
    experts = model.moe.num_experts
    fitting = [n for n in range(1, num_ranks + 1) if _fits(n, num_ranks, experts)]
    if size in fitting:
        return
    ranks = f"{num_ranks} training rank{'s' if num_ranks > 1 else ''}"
    if num_ranks % size:
        raise ValueError(
            f"{KEY}={size}: {ranks} cannot be divided into {size} groups; use {either(fitting)}, or train on a "
            f"multiple of {size} GPUs (trainer.nnodes x trainer.n_gpus_per_node)"
        )
    raise ValueError(
        f"{KEY}={size}: the model's {experts} experts, kept by {ranks}, cannot be divided over {size} groups of them; "
        f"use {either(fitting)}"
    )


def _fits(size: int, num_ranks: int, num_experts: int) -> bool:
    first_of_last_group = -(-num_experts // num_ranks) * (num_ranks - num_ranks // size)
    return num_ranks % size == 0 and num_experts % size == 0 and first_of_last_group < num_experts


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRanks:
    """This rank among the W = S * G that share the experts of a model."""

    size: int  # S
    num_neighbours: int  # G, ranks of a group, next to each other
    index: int  # of this rank's group
    exchange: dist.ProcessGroup  # the S ranks, one of each group, that rows travel between
    neighbours: dist.ProcessGroup | None  # this rank's group, which gathers weights; None where it is this rank alone

    @classmethod
    def of_process(cls, size: int, group: dist.ProcessGroup | None = None) -> ExpertRanks | None:
        """``size`` groups of the ranks of ``group`` (None: the default group), which call this together; None for 1."""
        if size == 1:
            return None
        width, rank = dist.get_world_size(group) // size, dist.get_rank(group)
        first = rank // width * width
        neighbours = subgroup(group, slice(first, first + width)) if width > 1 else None
        return cls(size, width, rank // width, subgroup(group, slice(rank % width, None, width)), neighbours)

    def gather(self, rows: Tensor, parameter: DTensor) -> Tensor:
        """This rank's rows of a ``parameter`` (E, ...) -> those of its group, in order."""
        if self.neighbours is None:
            return rows
        per_rank = self._per_rank(parameter)
        gathered = rows.new_empty(self.num_neighbours * per_rank, *rows.shape[1:])
        _all_gather(gathered, _padded(rows, per_rank), group=self.neighbours)
        return gathered[: len(parameter) - self.index * len(gathered)]

    def scatter(self, piece: Tensor, parameter: DTensor) -> Sequence[Tensor]:
        """Values of a group's rows of a ``parameter``, from each of its ranks -> those that all have for this rank's
        rows, by rank."""
        if self.neighbours is None:
            return [piece]
        sent = _padded(piece, self.num_neighbours * self._per_rank(parameter))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.neighbours)
        mine = len(parameter.to_local())
        return [part[:mine] for part in received.chunk(self.num_neighbours)]

    def journey(self, groups: ExpertGroups) -> Journey:
        """Of the rows of this forward's pairs; waits for the device, and for the other ranks."""
        num_experts = len(groups.offsets) - 1
        width = -(-num_experts // (self.size * self.num_neighbours)) * self.num_neighbours
        leaving = _padded(groups.offsets.diff(), self.size * width)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.exchange)
        own = arriving.view(self.size, width)[:, : num_experts - self.index * width]  # (S, experts of this group)
        sent, received = torch.stack([leaving, arriving]).view(2, self.size, width).sum(2).tolist()
        ends = pad(own.T.flatten().cumsum(0), (1, 0))  # of the rows for an expert from a rank, by expert and rank
        moved = ends[:-1].view(-1, self.size).T.flatten() - pad(own.flatten().cumsum(0), (1, 0))[:-1]
        ramp = torch.arange(sum(received), device=own.device)
        places = ramp + moved.repeat_interleave(own.flatten(), output_size=len(ramp))
        arrivals = ramp.new_zeros(roomy(len(ramp))).scatter_(0, places, ramp)
        return Journey(self.exchange, sent, received, places, arrivals, ends.int())

    def _per_rank(self, parameter: DTensor) -> int:
        return -(-len(parameter) // (self.size * self.num_neighbours))


@dataclass(frozen=True, slots=True, eq=False)
class Journey:
    """How many rows go to each of S ranks and come from each, and where those that come are put: by expert, and for an
    expert by the rank that they are from."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    places: Tensor  # (n,) int64, of the rows as they arrive: by rank, and from a rank by expert
    arrivals: Tensor  # (roomy(n),) int64, the other way round, and then 0
    ends: Tensor  # (S * experts of the group + 1,) int32, from 0 on: where an expert's rows from a rank end

    @property
    def offsets(self) -> Tensor:
        """(experts of the group + 1,) int32: where the rows for an expert begin and end."""
        return self.ends[:: len(self.received)].contiguous()

    def there(self, rows: Tensor) -> Tensor:
        """Rows of this rank's pairs, by expert -> the rows that all ranks have for its experts, by expert and rank;
        behind them copies of some row, which no expert computes with."""
        out: Tensor = _Trip.apply(rows, self._out, self._back)
        return out

    def home(self, rows: Tensor) -> Tensor:
        """The way back."""
        out: Tensor = _Trip.apply(rows, self._back, self._out)
        return out

    def _out(self, rows: Tensor) -> Tensor:
        return _traded(rows, self.group, self.sent, self.received).index_select(0, self.arrivals)

    def _back(self, rows: Tensor) -> Tensor:
        return _traded(rows.index_select(0, self.places), self.group, self.received, self.sent)


def roomy(count: int) -> int:
    """A number of rows at least as large, of which there are 16 in an octave: every layer gets another number, and a
    kernel is launched far sooner for a number that it has had before.

    >>> [roomy(count) for count in (0, 1, 100, 27_000, 27_649)]
    [0, 16, 112, 27648, 28672]
    """
    step = max(16, 1 << count.bit_length() >> 5)
    return -(-count // step) * step


class DistributedExperts(Experts):
    """``Experts`` of which every rank keeps some and computes with those of its group."""

    def __init__(self, experts: Experts, ranks: ExpertRanks, sharded: Callable[[nn.Parameter], nn.Parameter]) -> None:
        """``sharded``: makes a parameter a DTensor whose rows are divided over all ranks."""
        nn.Module.__init__(self)  # ``experts`` has made the parameters
        self.ops, self.ranks = experts.ops, ranks
        self.gate_up_proj, self.down_proj = sharded(experts.gate_up_proj), sharded(experts.down_proj)
        self.sums = OrderedSum(), OrderedSum()  # of their gradients

    def forward(self, x: Tensor, groups: ExpertGroups, again: dict[str, Any] | None = None) -> Tensor:
        """(T, H) -> (P, H) as ``Experts`` does it, bit for bit. All ranks call it together.

        A layer that runs again in the backward finds its journey in ``again``: nothing is asked, nobody is waited for.
        """
        journey = None if again is None else again.get("journey")
        if journey is None:
            journey = self.ranks.journey(groups)
            if again is not None:
                again["journey"] = journey
        pairs = _Pairs.apply(x, groups, sum(journey.sent), self.ops.combine)
        inner = self.ops.swiglu(self._product(0, journey.there(pairs), journey))
        return _padded(journey.home(self._product(1, inner, journey)), len(groups.rows))

    def _product(self, index: int, rows: Tensor, journey: Journey) -> Tensor:
        parameter: Any = (self.gate_up_proj, self.down_proj)[index]
        own = parameter.to_local(grad_placements=[Shard(0)])
        at = journey.offsets, journey.ends
        out: Tensor = _Product.apply(rows, own, *at, parameter.detach(), self.ranks, self.sums[index])
        return out


class _Trip(torch.autograd.Function):
    """Rows go one way, their gradients the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, go: Callable[[Tensor], Tensor], go_back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.go_back = go_back
        return go(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.go_back(gradient), None, None


class _Product(torch.autograd.Function):
    """``grouped_linear`` of rows (n, K) by expert and rank with the matrices of a group, of which this rank has its own
    (e, N, K) of a parameter.

    Every rank's rows give a gradient of their own. What comes out is the sum over all ranks, for this rank's matrices,
    onto that of the rounds before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        own: Tensor,
        offsets: Tensor,
        ends: Tensor,
        parameter: DTensor,
        ranks: ExpertRanks,
        total: OrderedSum,
    ) -> Tensor:
        matrices = ranks.gather(own.to(rows.dtype), parameter)
        ctx.save_for_backward(rows, matrices, offsets, ends)
        ctx.parameter, ctx.ranks, ctx.total = parameter, ranks, total
        out: Tensor = backend("moe.grouped_linear", rows).forward(rows, matrices, None, offsets, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrices, offsets, ends = ctx.saved_tensors
        op, dy = backend("moe.grouped_linear", rows), gradient.contiguous()
        dx = op.grad_input(dy, matrices, offsets) if ctx.needs_input_grad[0] else None
        total = _total(op, dy, rows, ends, matrices, ctx) if ctx.needs_input_grad[1] else None
        return dx, total, None, None, None, None, None


def _total(op: Any, dy: Tensor, rows: Tensor, ends: Tensor, matrices: Tensor, ctx: Any) -> Tensor:
    ranks, total = ctx.ranks, ctx.total

    def add(into: Tensor, leaves: int, fresh: bool) -> None:
        op.add_grad_weight(into, dy, rows, ends, ranks.size, leaves, fresh)

    if ranks.neighbours is None:  # no piece is on anyone's way
        return total.accumulate(matrices, add)
    pieces = op.grad_weight(dy, rows, None, ends, 1, ranks.size).unflatten(0, (ranks.size, -1))
    # source s is rank s * G + p of all, where p is the neighbour that has computed its piece
    return total.add(part for piece in pieces for part in ranks.scatter(piece, ctx.parameter))


class _Pairs(torch.autograd.Function):
    """x (T, H) -> (n, H), the token's row at every place that is taken; a token's gradients are added by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: ExpertGroups, num_taken: int, combine: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(*groups)
        ctx.combine = combine
        return x.index_select(0, groups.rows[:num_taken] // groups.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        groups = ExpertGroups(*ctx.saved_tensors)
        ones = torch.ones_like(groups.slots, dtype=torch.float32)
        return ctx.combine(_padded(gradient, len(groups.rows)), ones, groups), None, None, None


def _traded(rows: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _padded(rows: Tensor, count: int) -> Tensor:
    """Zeros behind the rows up to ``count``."""
    missing = count - len(rows)
    return pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows.contiguous()
