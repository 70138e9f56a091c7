"""The ranks that share each micro-batch: every one computes a slice of its tokens, all of them see its scores.

Log-probabilities keep the bits that one rank gives. A gradient of weights is the sum of the slices' gradients in the
order of the ranks, so its last bits depend on S, the number of ranks that share, and on nothing else about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.models import LogitProbe, Targets
from vexact.models.sequence_parallel import HeadExchange, SlicedMetadata
from vexact.ops import PackedMetadata
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy
from vexact.training.parallel.subgroup import subgroup

KEY = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"


def check_size(size: int, num_ranks: int, num_heads: int) -> None:
    """
    Args:
        size: S, the ranks that are to share a micro-batch. num_ranks: those that train. num_heads: of the queries.

    Raises:
        ValueError: S does not divide both.
    """
    fitting = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0 and num_heads % n == 0]
    if size in fitting:
        return
    if num_ranks % size:
        ranks = f"{num_ranks} training rank{'s' if num_ranks > 1 else ''}"
        raise ValueError(
            f"{KEY}={size}: {ranks} cannot be divided into groups of {size}; use {either(fitting)}, or train on a "
            f"multiple of {size} GPUs (trainer.nnodes x trainer.n_gpus_per_node)"
        )
    raise ValueError(
        f"{KEY}={size}: the model's {num_heads} attention heads cannot be divided over {size} ranks; use "
        f"{either(fitting)}"
    )


def either(sizes: Sequence[int]) -> str:
    """ "1, 2 or 4"."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRanks:
    """The S ranks that share micro-batches with this one: neighbours, so that they are on one machine if they can."""

    group: dist.ProcessGroup
    size: int
    rank: int

    @classmethod
    def of_process(cls, size: int, group: dist.ProcessGroup | None = None) -> SequenceRanks:
        """Every ``size`` neighbours of ``group`` (None: the default group), whose ranks call this together.

        Their collectives wait as long as those of ``group``.
        """
        rank = dist.get_rank(group)
        first = rank // size * size
        return cls(subgroup(group, slice(first, first + size)), size, rank - first)

    def add_whole(self, counts: Tensor) -> Tensor:
        """The sum of whole numbers over the ranks."""
        dist.all_reduce(counts, group=self.group)
        return counts

    def add_in_order(self, value: Tensor) -> Tensor:
        """The sum of a number () over the ranks, added in their order; the same on all of them."""
        every = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(every, value, group=self.group)
        total, *others = every
        for other in others:
            total = total + other
        return total

    def part(
        self, lengths: Sequence[int], target_rows: np.ndarray, device: torch.device | str
    ) -> tuple[SequencePart, SlicedMetadata]:
        """This rank's part of packed sequences.

        Args:
            lengths: input tokens of each sequence, T in all.
            target_rows: (R,) ascending indices of tokens, on the host.
        """
        num_tokens = sum(lengths)
        width = -(-num_tokens // self.size)
        fill = width * self.size - num_tokens
        # What fills the last slices up is a sequence of its own, which no target belongs to.
        packed = PackedMetadata.from_lengths([*lengths, fill] if fill else list(lengths), device)
        counts = np.bincount(target_rows // width, minlength=self.size)
        part = SequencePart(self, slice(self.rank * width, (self.rank + 1) * width), tuple(counts.tolist()))
        return part, SlicedMetadata(packed, HeadExchange(self.group, self.size))


@dataclass(frozen=True, slots=True, eq=False)
class SequencePart:
    """Which tokens and targets of one micro-batch are this rank's."""

    ranks: SequenceRanks
    tokens: slice  # as wide as every rank's; the last ones may lie past the T packed tokens
    counts: tuple[int, ...]  # targets of each rank, R in all

    @property
    def targets(self) -> slice:
        """This rank's of the R targets."""
        first = sum(self.counts[: self.ranks.rank])
        return slice(first, first + self.counts[self.ranks.rank])

    def slice_of(self, values: np.ndarray) -> np.ndarray:
        """This rank's of values (T,) per token, zeros past their end."""
        mine = values[self.tokens]
        return np.pad(mine, (0, self.tokens.stop - self.tokens.start - len(mine)))

    def own(self, targets: Targets) -> Targets:
        """Those of the R targets whose tokens are this rank's, by rows of its slice.

        They are copied: a kernel may be compiled in another way for addresses that are not multiples of 16.
        """
        some, dloss, probe = self.targets, targets.dloss, targets.probe

        def shifted(logprobs: Tensor, tokens: slice) -> Tensor:
            assert dloss is not None
            return dloss(logprobs, slice(some.start + tokens.start, some.start + tokens.stop))

        return Targets(
            rows=targets.rows[some] - self.tokens.start,
            token_ids=targets.token_ids[some].clone(),
            inv_temperature=targets.inv_temperature[some].clone(),
            min_logit=targets.min_logit[some].clone(),
            dloss=None if dloss is None else shifted,
            probe=None if probe is None else LogitProbe(probe.rows - some.start, probe.see),
        )

    def whole(self, scores: LinearCrossEntropy | TrainedCrossEntropy) -> LinearCrossEntropy | TrainedCrossEntropy:
        """The scores of all R targets, on every rank, from each rank's own.

        Every rank is to take the gradient of the same loss of them; it gets the part that flows into its own.
        """
        logprobs, entropy = _Gather.apply(self, scores.logprobs, scores.entropy)
        if isinstance(scores, TrainedCrossEntropy):
            return TrainedCrossEntropy(logprobs, entropy, scores.surrogate)
        return LinearCrossEntropy(logprobs, entropy)

    def gather(self, *columns: Tensor) -> Tensor:
        """Columns of this rank's targets -> those of all R targets: (columns, R)."""
        padded = columns[0].new_zeros(len(columns), max(self.counts))
        padded[:, : self.counts[self.ranks.rank]] = torch.stack(columns)
        every = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(every, padded, group=self.ranks.group)
        return torch.cat([part[:, :count] for part, count in zip(every, self.counts, strict=True)], dim=1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: SequencePart, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        ctx.part = part
        ctx.set_materialize_grads(False)
        logprobs, entropy = part.gather(logprobs, entropy)
        return logprobs.clone(), entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None
    ) -> tuple[None, Tensor | None, Tensor | None]:
        def own(gradient: Tensor | None) -> Tensor | None:
            return None if gradient is None else gradient[ctx.part.targets].clone()  # copied as in SequencePart.own

        return None, own(dlogprobs), own(dentropy)
