"""CPU twin of the router."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vexact.ops.cpu.moe import groups
from vexact.ops.cpu.reduce import tree_sum
from vexact.ops.cpu.sampling.portable_math import exp_of_negative
from vexact.ops.moe.digest import digest_of
from vexact.ops.moe.route import SIGMOID_EPS

ZERO_BELOW = -87.0  # e^z is 0 there, just above where it stops being a normal number
_NAN_KEY, _LEFT_OUT = 2**31 - 1, 1 - 2**31  # above that of inf, below that of -inf


def forward(
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
) -> tuple[Tensor, Tensor]:
    """logits (T, E) -> experts (T, k) int32, weights (T, k) fp32; digest (T,) int64 is added to."""
    scores = _scores(logits, scoring)
    choice = scores if bias is None else scores + bias
    keys = _order_keys(choice)
    if num_groups > 1:
        inside = _best_groups(choice.unflatten(1, (num_groups, -1)), scoring, top_groups)
        keys = torch.where(inside.unsqueeze(2), keys.unflatten(1, (num_groups, -1)), _LEFT_OUT).flatten(1)
    experts = _largest(keys, top_k).sort(1).values
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / _divisor(weights, scoring)
    if digest is not None:
        digest += digest_of(experts, salt)
    return experts.int(), (weights * scale).to(round_to).float()


def grouped_forward(
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    padding: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward`, then rows, slots and offsets of its experts, none for ``padding`` (T,) bool."""
    choice = top_k, scoring, num_groups, top_groups
    experts, weights = forward(logits, bias, digest, *choice, normalize, scale, round_to, salt)
    placed = experts if padding is None else experts.masked_fill(padding.unsqueeze(1), -1)
    return experts, weights, *groups.forward(placed, logits.shape[1])


def backward(
    dweights: Tensor, logits: Tensor, experts: Tensor, top_k: int, scoring: str, normalize: bool, scale: float
) -> Tensor:
    """dweights (T, k) -> dlogits (T, E).

    With s the scores, S their divisor and dw = scale * dweights: ds_j = (dw_j - sum_i dw_i s_i / S) / S, or dw_j
    without ``normalize``; dlogits = s (1 - s) ds for sigmoid, s (ds - sum_i ds_i s_i) for softmax. There the last sum
    is 0 with ``normalize``: an expert that was not chosen has no part in the weights.
    """
    scores, chosen = _scores(logits, scoring), experts.long()
    picked, grad = scores.gather(1, chosen), dweights * scale
    if normalize:
        divisor = _divisor(picked, scoring)
        grad = (grad - _added(grad * picked) / divisor) / divisor
    if scoring == "sigmoid":
        return torch.zeros_like(logits).scatter_(1, chosen, grad * picked * (1.0 - picked))
    if normalize:
        return torch.zeros_like(logits).scatter_(1, chosen, grad * picked)
    dscores = torch.zeros_like(logits).scatter_(1, chosen, grad)
    return scores * (dscores - _added(grad * picked))


def _scores(logits: Tensor, scoring: str) -> Tensor:
    """(T, E) fp32. NaN stays NaN, and with softmax makes the row NaN, as does an infinite maximum."""
    if scoring == "sigmoid":
        small = _exp(-logits.abs())
        return torch.where(logits < 0, small, 1.0) / (1.0 + small)
    exponentials = _exp(logits - logits.amax(1, keepdim=True))
    width = exponentials.shape[1]
    padded = F.pad(exponentials, (0, (1 << (width - 1).bit_length()) - width))
    return exponentials / tree_sum(padded).unsqueeze(1)


def _exp(z: Tensor) -> Tensor:
    """e^z for z <= 0; NaN for NaN."""
    with np.errstate(invalid="ignore"):
        values = torch.from_numpy(exp_of_negative(z.numpy()))
    return torch.where(z < ZERO_BELOW, 0.0, values)


def _divisor(weights: Tensor, scoring: str) -> Tensor:
    total = _added(weights)
    return total + SIGMOID_EPS if scoring == "sigmoid" else total


def _added(x: Tensor) -> Tensor:
    """(T, k) -> (T, 1), one column after the other."""
    first, *others = x.split(1, dim=1)
    total = first
    for column in others:
        total = total + column
    return total


def _best_groups(choice: Tensor, scoring: str, top_groups: int) -> Tensor:
    """(T, groups, experts of a group) -> (T, groups), whether the group is among the best."""
    if scoring == "sigmoid":
        first, second = choice.topk(2, dim=2).values.unbind(2)
        best = first + second
    else:
        best = choice.amax(2)
    return torch.zeros_like(best, dtype=torch.bool).scatter_(1, _largest(_order_keys(best), top_groups), True)


def _order_keys(values: Tensor) -> Tensor:
    """int64 in the range of int32, ordered as fp32 values are: -0 is +0, and NaN comes last of all."""
    bits = (values + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.where(values.isnan(), _NAN_KEY, keys.long())


def _largest(keys: Tensor, count: int) -> Tensor:
    """(T, n) int64 keys -> (T, count) indices of the largest, equal ones by index."""
    index = torch.arange(keys.shape[1])
    return ((keys << 32) - index).topk(count, dim=1).indices
