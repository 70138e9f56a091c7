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
from vexact.models.layers import Routing
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy
from vexact.training.batches.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.training.batches.packing import pack
from vexact.training.parallel.ranks import Ranks

FILLER = TokenSequence(prompt=(0,), response=(0,))
"""What a rank computes while other ranks have more micro-batches, so that their collectives match."""


class Scored(NamedTuple):
    """Sequences by index, ascending, and for each what a forward gave its response tokens."""

    indices: list[int]
    logprobs: list[np.ndarray]  # fp32 (R,) each
    routes: list[np.ndarray] | None = None  # int64 (R,) each, as ``Sample.route_digests``; None without experts

    def under(self, indices: Sequence[int]) -> Scored:
        """The same where sequence i has the index ``indices[i]``, ascending as well."""
        return self._replace(indices=[indices[i] for i in self.indices])


def token_scores(model: CausalLM, batch: PackedBatch) -> LinearCrossEntropy | TrainedCrossEntropy:
    """Log-probability and entropy of every response token of the batch, fp32 (R,), on all ranks that share it."""
    return routed_scores(model, batch)[0]


def routed_scores(
    model: CausalLM, batch: PackedBatch, routing: Routing | None = None
) -> tuple[LinearCrossEntropy | TrainedCrossEntropy, Tensor | None]:
    """``token_scores``, and (R,) int64 what experts the row that predicts each response token chose, if there are any.

    ``routing``: what else the forward is to know of experts.
    """
    targets = batch.targets if batch.part is None else batch.part.own(batch.targets)
    args = batch.input_ids, batch.positions, batch.attention
    if not model.chooses_experts:
        scores, digest = model(*args, targets=targets), None
    else:
        digest = torch.zeros_like(batch.input_ids)
        scores = model(*args, targets=targets, route_digest=digest, routing=routing)
        digest = digest[targets.rows]
    if batch.part is None:
        return scores, digest
    return batch.part.whole(scores), None if digest is None else batch.part.gather(digest)[0]


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
    groups = pack(lengths, budget, balance=True, ranks=ranks.at_once, names=names, key=ranks.budget_key)
    groups = ranks.share(groups)
    values, routes = [], []
    try:
        for group in groups:
            interrupt.check()
            batch = group_batch(sequences, group, ranks)
            scores, digest = routed_scores(model, batch if watch is None else watch(batch, group))
            values.append(scores.logprobs)
            routes.append(digest)
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward without a backward leaves gathered copies in the place of the root's weights
    return by_sequence(values, routes, sequences, ranks.reported(groups))


def by_sequence(
    values: Sequence[Tensor],
    routes: Sequence[Tensor | None],
    sequences: Sequence[TokenSequence],
    groups: Sequence[Sequence[int]],
) -> Scored:
    """Splits the packed log-probabilities and routes (R,) of every group into one array per sequence, in ascending
    order of indices.

    Without groups they go nowhere, as do a filler's. All of a kind come to the host in one copy, so that the device is
    waited for once.
    """
    order = [index for group in groups for index in group]
    lengths = [len(sequences[index].response) for index in order]
    digests = [digest for digest in routes if digest is not None]

    def split(parts: Sequence[Tensor]) -> list[np.ndarray]:
        if not order:
            return []
        packed = torch.cat([part for part, group in zip(parts, groups, strict=True) if group]).cpu()
        by_index = dict(zip(order, packed.split(lengths), strict=True))
        return [by_index[index].numpy() for index in sorted(order)]

    return Scored(sorted(order), split(values), split(digests) if digests else None)


def join(scored: Scored, lengths: Sequence[int], ranks: Ranks) -> Scored:
    """The shares of all ranks, on every rank, for all of the sequences, of which ``lengths`` are given."""
    if ranks.mesh is None:
        return scored

    def joined(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> list[np.ndarray]:
        packed = torch.zeros(sum(lengths), dtype=dtype)
        parts = packed.split(list(lengths))
        for index, values in zip(scored.indices, arrays, strict=True):
            parts[index].copy_(torch.from_numpy(values))
        bits = packed.view(torch.int32) if dtype == torch.float32 else packed
        whole = ranks.add_bits(bits.to(ranks.device)).cpu().view(dtype)
        return [part.numpy() for part in whole.split(list(lengths))]

    routes = None if scored.routes is None else joined(scored.routes, torch.int64)
    return Scored(list(range(len(lengths))), joined(scored.logprobs, torch.float32), routes)
