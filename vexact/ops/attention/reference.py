"""Attention spelt out in fp64, one sequence at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out (T, Hq, Dv), lse (T, Hq)) in fp64; differentiable. Rows that see no key give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True):
        keys = k[k0:k1].double().repeat_interleave(group, dim=1)
        values = v[k0:k1].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1].double(), keys) * softmax_scale
        if causal:
            last_key = torch.arange(q1 - q0, device=q.device) + (k1 - k0) - (q1 - q0)
            hidden = torch.arange(k1 - k0, device=q.device) > last_key.unsqueeze(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        probs = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        outs.append(torch.einsum("hqk,khd->qhd", probs, values))
        lses.append(lse.T)
    return torch.cat(outs), torch.cat(lses)


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return list(pairwise(ends))
