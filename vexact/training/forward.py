"""From sequences to log-probabilities: the one forward that training, reference and warm-up share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vexact import interrupt
from vexact.models import CausalLM
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy
from vexact.training.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.training.packing import BUDGET_KEY, pack
from vexact.training.ranks import Ranks, lone_mesh, shard
from vexact.training.sequence_parallel import KEY as SHARING_KEY

FILLER = TokenSequence(prompt=(0,), response=(0,))
"""What a rank computes while other ranks have more micro-batches, so that their collectives match."""


def prepare(model: CausalLM, ranks: Ranks, dtype: torch.dtype, fsdp: bool | None) -> None:
    """Shards ``model`` in place when asked to, or when several ranks or a second dtype need it (``ActorConfig.fsdp``).

    Raises ValueError when sharding is switched off although it is needed.
    """
    model_dtype = next(model.parameters()).dtype
    needed = ranks.mesh is not None or model_dtype != dtype
    if fsdp is False and needed:
        raise ValueError(
            f"actor.fsdp=False needs one rank and a model in {dtype}; "
            f"there are {ranks.world_size} rank(s) and the model is in {model_dtype}"
        )
    if fsdp or needed:
        mesh = lone_mesh(ranks.device) if ranks.mesh is None else ranks.mesh
        shard(model, list(model.parallel_layers), mesh, dtype)


def token_scores(model: CausalLM, batch: PackedBatch) -> LinearCrossEntropy | TrainedCrossEntropy:
    """Log-probability and entropy of every response token of the batch, fp32 (R,), on all ranks that share it."""
    targets = batch.targets if batch.share is None else batch.share.own(batch.targets)
    scores = model(batch.input_ids, batch.positions, batch.attention, targets=targets)
    return scores if batch.share is None else batch.share.whole(scores)


def micro_batches(
    sequences: Sequence[TokenSequence], names: Sequence[str], budget: int, balance: bool, ranks: Ranks
) -> list[list[int]]:
    """Groups of sequence indices, as many on every rank: a rank with fewer gets empty groups at the end."""
    key = BUDGET_KEY if ranks.sequence is None else f"{BUDGET_KEY} x {SHARING_KEY}"
    groups = pack([s.num_input_tokens for s in sequences], budget, balance=balance, names=names, key=key)
    (most,) = ranks.maximum(len(groups))
    return groups + [[] for _ in range(most - len(groups))]


def group_batch(sequences: Sequence[TokenSequence], group: Sequence[int], ranks: Ranks) -> PackedBatch:
    """The packed tensors of one group, a filler for an empty one."""
    return pack_tokens([sequences[i] for i in group] or [FILLER], ranks.device, ranks.sequence)


@torch.no_grad()
def score(
    model: CausalLM,
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    budget: int,
    ranks: Ranks,
    watch: Callable[[PackedBatch, list[int]], PackedBatch] | None = None,
) -> list[np.ndarray]:
    """Log-probabilities of every response without gradients: per sequence (R,) fp32. All ranks call it together.

    ``budget`` is the tokens of a micro-batch, over all ranks that share it.
    ``watch(batch, group)`` may exchange the batch of a group for one whose forward is observed.
    """
    groups = micro_batches(sequences, names, budget, True, ranks)
    values = []
    for group in groups:
        interrupt.check()
        batch = group_batch(sequences, group, ranks)
        values.append(token_scores(model, batch if watch is None else watch(batch, group)).logprobs)
    return by_sequence(values, sequences, groups)


def by_sequence(
    values: Sequence[Tensor], sequences: Sequence[TokenSequence], groups: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Splits the packed values (R,) of every group into one (R,) fp32 array per sequence; a filler's go nowhere.

    All values come to the host in one copy, so that the device is waited for once.
    """
    result: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
    order = [index for group in groups for index in group]
    if not order:
        return result
    packed = torch.cat([part for part, group in zip(values, groups, strict=True) if group]).cpu()
    lengths = [len(sequences[index].response) for index in order]
    for index, part in zip(order, packed.split(lengths), strict=True):
        result[index] = part.numpy()
    return result
