"""Experts that stay where they are: rows of tokens travel to them, and come home before they are added up.

All W ranks keep weights as FSDP2 would, rank r the experts r * ceil(E / W) and on. Of S groups of W/S neighbours each
computes with the experts of its own ranks, gathered among them, for tokens of all ranks.

No bit depends on S. A row of a grouped product knows no other rows, and a token's are added at home. The owner keeps
the rows of every rank apart, so that the gradient of a matrix comes in the pieces that these ranks would have computed;
they are added as ``gradient_sum`` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from vexact.ops.moe import ExpertGroups
from vexact.training.parallel.ordered_sum import OrderedSum
from vexact.training.parallel.sequence_parallel import either
from vexact.training.parallel.subgroup import subgroup

KEY = "actor_rollout_ref.actor.fsdp_config.expert_parallel_size"
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
_ALIGNMENT = 64  # bytes, which BLAS and compiled kernels tell apart


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
    if model.moe is None:
        raise ValueError(f"{KEY}={size}: {model.architecture} has no experts to share; set it to 1")
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
        own = arriving.view(self.size, width)[:, : num_experts - self.index * width]
        sent, received = torch.stack([leaving, arriving]).view(2, self.size, width).sum(2).tolist()
        ramp = torch.arange(max(received), dtype=torch.int32, device=own.device)
        offsets = pad(own.cumsum(1), (1, 0)).int()
        places = [
            ExpertGroups(ramp[:count], ramp[:count].view(-1, 1), ends.clone())
            for count, ends in zip(received, offsets, strict=True)
        ]
        return Journey(self.exchange, sent, received, places)

    def _per_rank(self, parameter: DTensor) -> int:
        return -(-len(parameter) // (self.size * self.num_neighbours))


@dataclass(frozen=True, slots=True, eq=False)
class Journey:
    """How many rows go to each of S ranks and come from each, those for one expert after those for another."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    places: list[ExpertGroups]  # of the rows from each rank, in the order in which they arrive

    def there(self, rows: Tensor) -> Tensor:
        """Rows of this rank's pairs, by expert -> the rows that all ranks have for its experts, by rank and expert."""
        out: Tensor = _Trade.apply(rows, self.group, self.sent, self.received)
        return out

    def home(self, rows: Tensor) -> Tensor:
        """The way back."""
        out: Tensor = _Trade.apply(rows, self.group, self.received, self.sent)
        return out


class DistributedExperts(Experts):
    """``Experts`` of which every rank keeps some and computes with those of its group."""

    def __init__(self, experts: Experts, ranks: ExpertRanks, sharded: Callable[[nn.Parameter], nn.Parameter]) -> None:
        """``sharded``: makes a parameter a DTensor whose rows are divided over all ranks."""
        nn.Module.__init__(self)  # ``experts`` has made the parameters
        self.ops, self.ranks = experts.ops, ranks
        self.gate_up_proj, self.down_proj = sharded(experts.gate_up_proj), sharded(experts.down_proj)
        self.sums = OrderedSum(), OrderedSum()  # of their gradients

    def forward(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        """(T, H) -> (P, H) as ``Experts`` does it, bit for bit. All ranks call it together."""
        journey = self.ranks.journey(groups)
        pairs = _Pairs.apply(x, groups, sum(journey.sent), self.ops.combine)
        arrived = journey.there(pairs).split(journey.received)
        # a name for every source's matrices, so that autograd gives every source's gradient
        gate_up, down = map(self._matrices, (self.gate_up_proj, self.down_proj), self.sums, (x.dtype, x.dtype))
        out = []
        for rows, places, first, second in zip(arrived, journey.places, gate_up, down, strict=True):
            inner = self.ops.swiglu(self.ops.grouped_linear(_aligned(rows), first, places, gather=False))
            out.append(self.ops.grouped_linear(inner, second, places, gather=False))
        return _padded(journey.home(torch.cat(out)), len(groups.rows))

    def _matrices(self, parameter: Any, total: OrderedSum, dtype: torch.dtype) -> Sequence[Tensor]:
        rows = parameter.to_local(grad_placements=[Shard(0)])
        matrices: Sequence[Tensor] = _Matrices.apply(rows, parameter.detach(), dtype, self.ranks, total)
        return matrices


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
        ctx.way = group, sent, received
        return _traded(rows, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        group, sent, received = ctx.way
        return _traded(gradient, group, received, sent), None, None, None


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


class _Matrices(torch.autograd.Function):
    """This rank's rows of a parameter -> S times the matrices of its group, in the dtype that computes.

    The gradients of the S are those of as many ranks' rows; what comes out is the sum over all ranks, for this rank's
    rows, onto that of the rounds before.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, parameter: DTensor, dtype: torch.dtype, ranks: ExpertRanks, total: OrderedSum
    ) -> tuple[Tensor, ...]:
        ctx.parameter, ctx.ranks, ctx.total = parameter, ranks, total
        whole = ranks.gather(rows.to(dtype), parameter)
        return tuple(whole.view_as(whole) for _ in range(ranks.size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pieces: Tensor) -> tuple[Tensor, None, None, None, None]:
        # source s is rank s * G + p of all, where p is the neighbour that has computed its piece
        every: Iterator[Tensor] = (part for piece in pieces for part in ctx.ranks.scatter(piece, ctx.parameter))
        return ctx.total.add(every), None, None, None, None


def _traded(rows: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _padded(rows: Tensor, count: int) -> Tensor:
    """Zeros behind the rows up to ``count``."""
    missing = count - len(rows)
    return pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows.contiguous()


def _aligned(rows: Tensor) -> Tensor:
    """Memory that begins where memory of its own would."""
    return rows if rows.data_ptr() % _ALIGNMENT == 0 else rows.clone()
