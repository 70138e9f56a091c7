"""Gradient of packed attention on CPU: sequences of similar length padded together, scores recomputed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vexact.ops.cpu.reduce import tree_sum

SCORES_PER_CHUNK = 1 << 23  # 32 MiB of fp32 scores at a time


def packed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (T, Hq, D), dk (Tk, Hkv, D), dv (Tk, Hkv, Dv); formulas of Dao et al. 2022, arXiv 2205.14135, appendix B."""
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    delta = tree_sum(dout.float() * out.float())  # (T, Hq)
    lengths_q, lengths_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    for chunk in _chunks(lengths_q, lengths_k, q.shape[1]):
        rows_q, valid_q = _padded_rows(cu_seqlens_q[:-1].long()[chunk], lengths_q[chunk])
        rows_k, valid_k = _padded_rows(cu_seqlens_k[:-1].long()[chunk], lengths_k[chunk])
        mask = valid_q.unsqueeze(2) & valid_k.unsqueeze(1)
        if causal:
            offset = (lengths_k[chunk] - lengths_q[chunk])[:, None, None]
            mask &= torch.arange(rows_k.shape[1]) <= torch.arange(rows_q.shape[1]).unsqueeze(1) + offset
        padded = [
            t[rows].float() for t, rows in zip((dout, q, lse, delta, k, v), [rows_q] * 4 + [rows_k] * 2, strict=True)
        ]
        grads = _dense_backward(*padded, mask=mask, scale=scale)
        for target, rows, valid, grad in zip(
            (dq, dk, dv), (rows_q, rows_k, rows_k), (valid_q, valid_k, valid_k), grads, strict=True
        ):
            target[rows[valid]] = grad[valid].to(target.dtype)
    return dq, dk, dv


def _dense_backward(
    dout: Tensor, q: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded (B, L, heads, D) tensors; mask (B, Lq, Lk)."""
    num_kv_heads = k.shape[2]
    # (B, Hkv, group, L, D): the group axis is summed away in dk and dv
    q, dout = (t.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4) for t in (q, dout))
    lse, delta = (t.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1).unsqueeze(-1) for t in (lse, delta))
    k, v = (t.permute(0, 2, 1, 3).unsqueeze(2) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    probs = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)).masked_fill(~mask[:, None, None], 0.0)
    dscores = probs * (dout @ v.transpose(-1, -2) - delta) * scale
    dq = (dscores @ k).permute(0, 3, 1, 2, 4).flatten(2, 3)
    dk = (dscores.transpose(-1, -2) @ q).sum(2).permute(0, 2, 1, 3)
    dv = (probs.transpose(-1, -2) @ dout).sum(2).permute(0, 2, 1, 3)
    return dq, dk, dv


def _chunks(lengths_q: Tensor, lengths_k: Tensor, num_heads: int) -> Iterator[Tensor]:
    """Sequences sorted by length, cut so that each chunk's padded scores stay under the limit."""
    order = (lengths_q * (1 << 32) + lengths_k).argsort(descending=True)
    order = order[(lengths_q[order] > 0) & (lengths_k[order] > 0)]
    while len(order):
        area = int(lengths_q[order[0]] * lengths_k[order].amax()) * num_heads
        size = max(1, SCORES_PER_CHUNK // area)
        yield order[:size]
        order = order[size:]


def _padded_rows(start: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) row indices, clamped to the sequence's last row, and which of them are real."""
    index = torch.arange(int(lengths.max())).unsqueeze(0)
    return start.unsqueeze(1) + index.minimum(lengths.unsqueeze(1) - 1), index < lengths.unsqueeze(1)
