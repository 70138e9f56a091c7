"""CPU twin of sample."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.cpu.logprob import token_logprobs
from vexact.ops.cpu.philox import uniform


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, V) fp32 -> token_ids (B,) int64, logprobs (B,) fp32, min_logit (B,) fp32."""
    greedy = temperature <= 0
    inv_temperature = torch.where(greedy, 1.0, 1.0 / temperature)
    min_logit = torch.full_like(temperature, float("-inf"))
    filtered = ~greedy & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    if filtered.any():
        rows = filtered.nonzero().squeeze(1)
        min_logit[rows] = _thresholds(logits[rows], inv_temperature[rows], top_k[rows], top_p[rows], min_p[rows])
    scores = logits.clone()
    if not greedy.all():
        rows = (~greedy).nonzero().squeeze(1)
        noise = torch.from_numpy(uniform(seed[rows].numpy(), position[rows].numpy(), logits.shape[1]))
        gumbel = -torch.log(-torch.log(noise))
        kept = logits[rows] * inv_temperature[rows].unsqueeze(1) + gumbel
        scores[rows] = kept.masked_fill(logits[rows] < min_logit[rows].unsqueeze(1), float("-inf"))
    token_ids = scores.argmax(-1)
    return token_ids, token_logprobs(logits, token_ids, inv_temperature, min_logit)[0], min_logit


def _thresholds(logits: Tensor, inv_temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest kept logit per row after top-k, then top-p, then min-p."""
    ordered = logits.sort(dim=-1, descending=True).values
    width = logits.shape[1]
    num_kept = torch.where(top_k > 0, top_k, width).clamp(1, width).to(torch.int64)
    kth = ordered.gather(1, num_kept.unsqueeze(1) - 1)
    inside = ordered >= kth
    weights = torch.exp((ordered - ordered[:, :1]) * inv_temperature.unsqueeze(1)).masked_fill_(~inside, 0.0)
    probs = weights / weights.cumsum(-1)[:, -1:]
    before = probs.cumsum(-1) - probs  # mass of strictly better tokens
    inside &= (before < top_p.unsqueeze(1)) | (top_p.unsqueeze(1) >= 1)
    inside &= probs >= min_p.unsqueeze(1) * probs[:, :1]
    last = inside.cumsum(-1).argmax(-1, keepdim=True)  # first index where the count peaks = last kept
    return ordered.gather(1, last).squeeze(1)
