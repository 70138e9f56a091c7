"""From weights and rejected tokens to one factor per token, which leaves the denominators of the loss as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.algorithms.correction.settings import CorrectionConfig
from vexact.algorithms.packed import segment_sum


@dataclass(frozen=True, slots=True, eq=False)
class LossScales:
    """What to multiply per-token losses with, (T,) fp32; exactly 1 where nothing is corrected."""

    policy: Tensor
    others: Tensor  # of the entropy and the KL term


def loss_scales(
    weights: Tensor | None, kept: Tensor, lengths: Tensor, agg_mode: str, config: CorrectionConfig
) -> LossScales:
    """The factors of one mini-batch: weights (T,) fp64, kept (T,) bool, lengths (N,) of its sequences.

    A rejected token counts 0, and means are over what is kept, as in verl: ``seq-mean-token-mean`` over the kept tokens
    of a sequence, ``token-mean`` over those of the mini-batch unless the correction is a bypass, whose rejections leave
    that denominator, the entropy and the KL term alone. Sequences are counted whether or not they keep a token.
    """
    factor = kept.double()
    if agg_mode == "seq-mean-token-mean":
        factor = factor * torch.repeat_interleave(lengths / segment_sum(factor, lengths).clamp_min(1), lengths)
    elif agg_mode == "token-mean" and not config.bypass:
        factor = factor * (kept.numel() / factor.sum().clamp_min(1))
    weighted = factor if weights is None or not config.weights_apply else factor * weights
    others = torch.ones_like(factor) if config.bypass else factor
    return LossScales(weighted.float(), others.float())
