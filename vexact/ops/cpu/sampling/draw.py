"""CPU twin of sample: the same tokens and thresholds as the kernels, bit for bit, for the same logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vexact.ops.cpu.logprob import token_logprobs
from vexact.ops.cpu.sampling.gumbel import gumbel
from vexact.ops.cpu.sampling.philox import random_bits
from vexact.ops.cpu.sampling.portable_math import exp_of_negative, log_of_normal

_MASS_BITS = 40  # probabilities relative to the largest are summed as multiples of 2^-40
_SMALLEST_NORMAL = np.float32(2.0**-126)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, V) fp32 -> token_ids (B,) int64, logprobs (B,) fp32, min_logit (B,) fp32."""
    greedy = temperature <= 0
    inv_temperature = torch.where(greedy, 1.0, 1.0 / temperature)
    min_logit = torch.full_like(temperature, float("-inf"))
    filtered = ~greedy & ((top_k > 0) & (top_k < logits.shape[1]) | (top_p < 1) | (min_p > 0))
    if filtered.any():
        rows = filtered.nonzero().squeeze(1)
        min_logit[rows] = _thresholds(logits[rows], inv_temperature[rows], top_k[rows], top_p[rows], min_p[rows])
    scores = logits.clone()
    if not greedy.all():
        rows = (~greedy).nonzero().squeeze(1)
        noise = torch.from_numpy(gumbel(random_bits(seed[rows].numpy(), position[rows].numpy(), logits.shape[1])))
        kept = logits[rows] * inv_temperature[rows].unsqueeze(1) + noise
        scores[rows] = kept.masked_fill(logits[rows] < min_logit[rows].unsqueeze(1), float("-inf"))
    token_ids = scores.argmax(-1)
    return token_ids, token_logprobs(logits, token_ids, inv_temperature, min_logit)[0], min_logit


def _thresholds(logits: Tensor, inv_temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest kept logit per row after top-k, then top-p, then min-p; every sum is of integers, so exact."""
    ordered = logits.sort(dim=-1, descending=True).values
    width = logits.shape[1]
    num_kept = torch.where(top_k > 0, top_k, width).clamp(1, width).to(torch.int64)
    inside = ordered >= ordered.gather(1, num_kept.unsqueeze(1) - 1)
    below_top = ordered * inv_temperature.unsqueeze(1) - ordered[:, :1] * inv_temperature.unsqueeze(1)  # z - max z
    mass = (
        (torch.from_numpy(exp_of_negative(below_top.numpy())) * 2.0**_MASS_BITS)
        .to(torch.int64)
        .masked_fill_(~inside, 0)
    )
    reached = mass.cumsum(-1)
    wanted = torch.ceil(top_p.double() * reached[:, -1].double()).to(torch.int64).unsqueeze(1)
    inside &= (reached - mass < wanted) | (top_p.unsqueeze(1) >= 1)  # tokens before it do not reach the mass yet
    log_min_p = torch.from_numpy(log_of_normal(np.maximum(min_p.numpy(), _SMALLEST_NORMAL))).unsqueeze(1)
    inside &= (below_top >= log_min_p) | (min_p.unsqueeze(1) <= 0)
    last = inside.cumsum(-1).argmax(-1, keepdim=True)  # first index where the count peaks = last kept
    return ordered.gather(1, last).squeeze(1) + 0.0  # -0 and +0 are one value
