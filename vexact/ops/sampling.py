"""Sampling a token per row, independent of batch mates, with the log-probability the trainer will compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vexact.ops.checks import check_dims, check_per_row
from vexact.ops.dispatch import backend


class SamplingTensors(NamedTuple):
    """Per-row sampling parameters on the device of the logits.

    ``seed`` is unique per request and ``position`` is the index of the sampled token in its sequence: together they key
    the counter-based generator, so the draw does not depend on scheduling.
    """

    temperature: Tensor  # (B,) fp32, 0 = greedy
    top_k: Tensor  # (B,) int32, <= 0 = off
    top_p: Tensor  # (B,) fp32, 1 = off
    min_p: Tensor  # (B,) fp32, 0 = off
    seed: Tensor  # (B,) int64
    position: Tensor  # (B,) int64


class SampledTokens(NamedTuple):
    """Per row: token id (B,) int64, its fp32 log-probability, and the smallest kept raw logit (fp32, -inf = all)."""

    token_ids: Tensor
    logprobs: Tensor
    min_logit: Tensor


def sample(logits: Tensor, params: SamplingTensors) -> SampledTokens:
    """Gumbel-max sampling (Gumbel 1954; Maddison et al. 2014) over the kept set {logit >= min_logit}.

    Noise is Philox4x32-10 (Salmon et al. 2011) keyed by seed, with (vocabulary index, position) as the counter. Filters
    apply in the order top-k, top-p, min-p; logits equal to the threshold are all kept. Greedy rows ignore the filters
    and report the log-probability at temperature 1.

    Args:
        logits: (B, V) fp32, unscaled.

    Raises:
        ValueError: logits are not (B, V) fp32, or a parameter is not (B,) of its dtype.
    """
    if logits.dtype != torch.float32:
        raise ValueError(f"sample: logits are {logits.dtype}; they must stay fp32 (linear(..., out_dtype=fp32))")
    op = backend("sampling", logits)
    check_dims("sample", 2, "(B, V)", logits=logits)
    rows = logits.shape[0]
    check_per_row("sample", rows, torch.float32, temperature=params.temperature, top_p=params.top_p, min_p=params.min_p)
    check_per_row("sample", rows, torch.int32, top_k=params.top_k)
    check_per_row("sample", rows, torch.int64, seed=params.seed, position=params.position)
    return SampledTokens(*op.sample(logits, *params))
