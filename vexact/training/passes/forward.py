"""From sequences to log-probabilities: the one forward that training, reference and warm-up share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vexact import interrupt
from vexact.models import CausalLM
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy
from vexact.training.batches.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.training.batches.packing import pack
from vexact.training.parallel.ranks import Ranks

FILLER = TokenSequence(prompt=(0,), response=(0,))
"""What a rank computes while other ranks have more micro-batches, so that their collectives match."""


class Scored(NamedTuple):
    """Sequences by index, ascending, and the log-probabilities of each, fp32 (R,)."""

    indices: list[int]
    logprobs: list[np.ndarray]


def token_scores(model: CausalLM, batch: PackedBatch) -> LinearCrossEntropy | TrainedCrossEntropy:
    """Log-probability and entropy of every response token of the batch, fp32 (R,), on all ranks that share it."""
    targets = batch.targets if batch.part is None else batch.part.own(batch.targets)
    scores = model(batch.input_ids, batch.positions, batch.attention, targets=targets)
    return scores if batch.part is None else batch.part.whole(scores)


def group_batch(sequences: Sequence[TokenSequence], group: Sequence[int], ranks: Ranks) -> PackedBatch:
    """The packed tensors of one group, a filler for an empty one; of this rank's part where ranks share it."""
    return pack_tokens([sequences[i] for i in group] or [FILLER], ranks.device, ranks.sequence)


def fingerprint(sequences: Sequence[TokenSequence], names: Sequence[str]) -> int:
    """32 bits by which ranks tell that they were given the same sequences."""
    lengths = [(len(s.prompt), len(s.response)) for s in sequences]
    return zlib.crc32(repr((list(names), lengths)).encode())


@torch.no_grad()
def score(
    model: CausalLM,
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    budget: int,
    ranks: Ranks,
    watch: Callable[[PackedBatch, list[int]], PackedBatch] | None = None,
) -> Scored:
    """Log-probabilities of this rank's share of the sequences, without gradients.

    All ranks call it together, with the same sequences. ``watch(batch, group)`` may exchange the batch of a group for
    one whose forward is observed.
    """
    lengths = [s.num_input_tokens for s in sequences]
    groups = ranks.share(pack(lengths, budget, balance=True, names=names, key=ranks.budget_key))
    values = []
    try:
        for group in groups:
            interrupt.check()
            batch = group_batch(sequences, group, ranks)
            values.append(token_scores(model, batch if watch is None else watch(batch, group)).logprobs)
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward without a backward leaves gathered copies in the place of the root's weights
    return by_sequence(values, sequences, ranks.reported(groups))


def by_sequence(
    values: Sequence[Tensor], sequences: Sequence[TokenSequence], groups: Sequence[Sequence[int]]
) -> Scored:
    """Splits the packed values (R,) of every group into one array per sequence, in ascending order of indices.

    Without groups the values go nowhere, as do a filler's. All come to the host in one copy, so that the device is
    waited for once.
    """
    order = [index for group in groups for index in group]
    if not order:
        return Scored([], [])
    packed = torch.cat([part for part, group in zip(values, groups, strict=True) if group]).cpu()
    parts = packed.split([len(sequences[index].response) for index in order])
    by_index = {index: part.numpy() for index, part in zip(order, parts, strict=True)}
    return Scored(sorted(order), [by_index[index] for index in sorted(order)])


def join(scored: Scored, lengths: Sequence[int], ranks: Ranks) -> list[np.ndarray]:
    """The shares of all ranks, on every rank: (R,) fp32 for each of the sequences, of which ``lengths`` are given."""
    if ranks.mesh is None:
        return scored.logprobs
    packed = torch.zeros(sum(lengths), dtype=torch.int32)
    parts = packed.split(list(lengths))
    for index, values in zip(scored.indices, scored.logprobs, strict=True):
        parts[index].copy_(torch.from_numpy(values).view(torch.int32))
    whole = ranks.add_bits(packed.to(ranks.device)).cpu().view(torch.float32)
    return [part.numpy() for part in whole.split(list(lengths))]
