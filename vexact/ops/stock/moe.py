"""Mixture of experts as everyone else runs it: torch's softmax, top-k and grouped product, not batch-invariant.

Signatures match the invariant operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vexact.ops.moe import ExpertGroups, Routes
from vexact.ops.moe.digest import digest_of
from vexact.ops.moe.route import SIGMOID_EPS
from vexact.ops.moe.route_and_group import route_then_group
from vexact.ops.stock.dense import swiglu

_ALIGNED = 16  # bytes; what torch's grouped product asks of a row
_GROUPED_GPUS = (9, 10)  # major compute capability


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    scoring: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    round_to: torch.dtype = torch.float32,
    digest: Tensor | None = None,
    salt: int = 0,
) -> Routes:
    """torch's softmax or sigmoid and its top-k, whose ties are anyone's."""
    scores = logits.float().softmax(1) if scoring == "softmax" else logits.float().sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, -1))
        best = grouped.amax(2) if scoring == "softmax" else grouped.topk(2, dim=2).values.sum(2)
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(top_groups, dim=1).indices, False)
        choice = grouped.masked_fill(outside.unsqueeze(2), float("-inf")).flatten(1)
    experts = choice.topk(top_k, dim=1).indices.sort(1).values
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + (SIGMOID_EPS if scoring == "sigmoid" else 0.0))
    if digest is not None:
        digest += digest_of(experts, salt)
    return Routes(experts.int(), (weights * scale).to(round_to).float())


def group_tokens(experts: Tensor, num_experts: int) -> ExpertGroups:
    """torch's sort."""
    flat = experts.flatten().long()
    keys = torch.where(flat < 0, num_experts, flat)
    ordered, order = keys.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=flat.device)
    offsets = torch.searchsorted(ordered, bounds)
    places = torch.arange(flat.numel(), device=flat.device)
    slots = torch.empty_like(order).scatter_(0, order, places).masked_fill_(flat < 0, -1)
    rows = torch.where(ordered < num_experts, order, 0)
    return ExpertGroups(rows.int(), slots.view(experts.shape).int(), offsets.int())


def route_and_group(logits: Tensor, bias: Tensor | None = None, **settings: Any) -> tuple[Routes, ExpertGroups]:
    """One after the other."""
    return route_then_group(route, group_tokens, logits, bias, **settings)


def grouped_linear(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
    """torch's grouped product where it takes the tensors, else one product per expert."""
    if x.shape[0] and has_grouped_product(weight):
        return grouped_product(x, weight, groups, gather=gather)
    rows, taken = _rows(x, groups, gather)
    rows = torch.where(taken, rows, 0)
    ends = groups.offsets.tolist()
    parts = [F.linear(rows[a:b], matrix) for a, b, matrix in zip(ends, ends[1:], weight, strict=False)]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[1])])


def grouped_product(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
    """torch's grouped product, for weights that ``has_grouped_product``; it never waits for the device."""
    rows, taken = _rows(x, groups, gather)
    rows = torch.where(taken, rows, 0)
    return torch.where(taken, F.grouped_mm(rows, weight.transpose(1, 2), offs=groups.offsets[1:]), 0)


def _rows(x: Tensor, groups: ExpertGroups, gather: bool) -> tuple[Tensor, Tensor]:
    """A row per pair of token and expert, and which of them an expert computes, (P, 1) bool."""
    rows = x[groups.rows.long() // groups.top_k] if gather else x
    return rows, (torch.arange(rows.shape[0], device=x.device) < groups.offsets[-1]).unsqueeze(1)


def grouped_swiglu(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
    """One after the other."""
    return swiglu(grouped_linear(x, weight, groups, gather=gather))


def grouped_product_swiglu(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
    """One after the other."""
    return swiglu(grouped_product(x, weight, groups, gather=gather))


def combine(y: Tensor, weights: Tensor, groups: ExpertGroups, shared: Tensor | None = None) -> Tensor:
    """Weighted rows in the dtype of ``y``, summed by torch."""
    taken = (groups.slots >= 0).unsqueeze(2)
    rows = torch.where(taken, y[groups.slots.long().clamp_min(0)], 0)
    out = (rows * weights.to(y.dtype).unsqueeze(2)).sum(1)
    return out if shared is None else out + shared


def has_grouped_product(weight: Tensor) -> bool:
    """Whether torch has a kernel for these experts (E, N, K) and not a loop that waits for the device."""
    widths = (size * weight.element_size() % _ALIGNED for size in weight.shape[1:])
    fits = weight.is_cuda and weight.dtype == torch.bfloat16 and not any(widths)
    return fits and torch.cuda.get_device_capability(weight.device)[0] in _GROUPED_GPUS
