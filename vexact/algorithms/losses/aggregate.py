"""From per-token losses to the scalar that is differentiated.

Every mode is a weighted sum over tokens whose weights come from the *whole* mini-batch (all micro-batches, all ranks),
so adding up the micro-batches gives the same loss however the mini-batch was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


@dataclass(frozen=True, slots=True)
class Denominators:
    """Sizes of the whole mini-batch over all micro-batches and ranks."""

    num_tokens: int
    num_sequences: int
    scale_factor: int | None = None  # verl's loss_scale_factor, usually the maximum response length


def check_agg_mode(mode: str, scale_factor: int | None) -> int:
    """The constant that ``mode`` divides by (1 where it has none).

    Raises ValueError for an unknown mode and for a norm mode without its constant.
    """
    if mode not in LOSS_AGG_MODES:
        raise ValueError(f"unknown actor.loss_agg_mode {mode!r}; choose one of {', '.join(LOSS_AGG_MODES)}")
    if mode != "seq-mean-token-sum-norm":
        return 1
    if scale_factor is None or scale_factor < 1:
        raise ValueError(
            f"actor.loss_agg_mode={mode} divides by actor.loss_scale_factor, which is {scale_factor}; "
            "set it to a positive constant such as data.max_response_length"
        )
    return scale_factor


def token_weights(lengths: Tensor, mode: str, denominators: Denominators) -> Tensor:
    """The weight of every token's loss: lengths (N,) int64 -> (T,) fp32.

    token-mean 1/tokens; token-sum 1; seq-mean-token-sum 1/sequences; seq-mean-token-mean 1/(sequences * length);
    seq-mean-token-sum-norm 1/(sequences * scale_factor). Raises ValueError as ``check_agg_mode``.
    """
    scale_factor = check_agg_mode(mode, denominators.scale_factor)
    per_sequence = torch.ones(lengths.numel(), dtype=torch.float64, device=lengths.device)
    if mode == "token-mean":
        per_sequence /= denominators.num_tokens
    elif mode != "token-sum":
        per_sequence /= denominators.num_sequences
        if mode == "seq-mean-token-mean":
            per_sequence /= lengths
        elif mode == "seq-mean-token-sum-norm":
            per_sequence /= scale_factor
    return torch.repeat_interleave(per_sequence.float(), lengths)


def aggregate(values: Tensor, lengths: Tensor, mode: str, denominators: Denominators) -> Tensor:
    """This micro-batch's share of the aggregated loss: values (T,) -> scalar."""
    return (values * token_weights(lengths, mode, denominators)).sum()
