"""Which experts a token goes to and with which weights: a function of its own logits alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import FLOATS, check_dims, check_per_row
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend

SCORINGS = ("softmax", "sigmoid")
SIGMOID_EPS = 1e-20  # DeepSeek-V3 adds it to the sum that it divides by


class Routes(NamedTuple):
    """Per token its experts (T, k) int32, ascending and distinct, and their weights (T, k) fp32."""

    experts: Tensor
    weights: Tensor


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
    """Top-k routing of Qwen3-MoE and Mixtral (softmax), DeepSeek-V2 (softmax, groups) and DeepSeek-V3 (sigmoid, groups,
    correction bias; arXiv 2412.19437, section 2.1.2).

    Scores are fp32. Chosen are the ``top_k`` largest of score + bias, equal ones by index, NaN before everything; with
    groups among the experts of the ``top_groups`` best groups (best score + bias of the group, with sigmoid the sum of
    its two best; equal groups by index). A weight is the score without bias; with ``normalize`` over the sum of the
    chosen ones, added in the order of the index (with sigmoid plus 1e-20); then times ``scale``.

    Args:
        logits: (T, E) fp32, unrounded. bias: (E,) fp32, or None.
        num_groups: groups of equal size, 1 for none.
        round_to: weights are rounded to it and kept as fp32; Qwen3-MoE rounds to the dtype of the model.
        digest: (T,) int64, contiguous; a hash of the layer and the chosen experts is added in place, wrapping around.
        salt: index of the layer for the digest.

    Returns:
        :class:`Routes`; the weights are differentiable in ``logits``, as if they were not rounded.

    Raises:
        ValueError: sizes, dtypes or settings that do not fit together.
    """
    settings = top_k, scoring, num_groups, top_groups, normalize, float(scale), round_to, salt
    check_route("route", logits, bias, digest, *settings)
    bias = None if bias is None else bias.detach()
    return Routes(*apply(_Route, logits, bias, digest, *settings))


def check_route(
    op: str,
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
) -> None:
    """
    Raises:
        ValueError: the arguments of :func:`route`, for ``op``, do not fit together.
    """
    check_dims(op, 2, "(T, E)", logits=logits)
    if logits.dtype != torch.float32:
        raise ValueError(f"{op}: logits are {logits.dtype}; they must stay fp32 (linear(..., out_dtype=fp32))")
    num_tokens, num_experts = logits.shape
    _check_choice(op, num_experts, top_k, scoring, num_groups, top_groups)
    if bias is not None:
        check_per_row(op, num_experts, torch.float32, bias=bias)
        _check_device(op, "bias", bias, logits)
    if digest is not None:
        check_per_row(op, num_tokens, torch.int64, digest=digest)
        _check_device(op, "digest", digest, logits)
        if not digest.is_contiguous():
            raise ValueError(f"{op}: digest has strides {digest.stride()}; it must be contiguous, as torch.zeros is")
    if not abs(scale) < float("inf"):
        raise ValueError(f"{op}: scale is {scale}; it must be finite")
    if round_to not in FLOATS:
        raise ValueError(f"{op}: round_to is {round_to}; use fp32, bf16 or fp16")
    if not 0 <= salt < 1 << 31:
        raise ValueError(f"{op}: salt is {salt}; use the index of the layer")


def _check_choice(op: str, num_experts: int, top_k: int, scoring: str, num_groups: int, top_groups: int) -> None:
    if scoring not in SCORINGS:
        raise ValueError(f"{op}: unknown scoring {scoring!r}; use one of {', '.join(SCORINGS)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"{op}: num_groups={num_groups} does not divide {num_experts} experts")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"{op}: top_groups={top_groups} is outside 1 ... num_groups={num_groups}")
    group = num_experts // num_groups
    if num_groups > 1 and group < 2 and scoring == "sigmoid":
        raise ValueError(f"{op}: {num_groups} groups of one expert; sigmoid scoring adds the two best of a group")
    if not 1 <= top_k <= group * top_groups:
        raise ValueError(f"{op}: top_k={top_k} is outside 1 ... {group * top_groups}, the experts to choose from")


def _check_device(op: str, name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{op}: logits are on {logits.device} but {name} is on {tensor.device}")


def route_reference(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    scoring: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> Routes:
    """The same in fp64 by sorting; finite logits only."""
    wide = logits.double()
    scores = wide.softmax(1) if scoring == "softmax" else wide.sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias.double()
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, -1))
        best = grouped.amax(2) if scoring == "softmax" else grouped.topk(2, dim=2).values.sum(2)
        kept = _first(best, top_groups)
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(outside.unsqueeze(2), float("-inf")).flatten(1)
    experts = _first(choice, top_k).sort(1).values
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + (SIGMOID_EPS if scoring == "sigmoid" else 0.0))
    return Routes(experts.int(), weights * scale)


def _first(values: Tensor, count: int) -> Tensor:
    """Indices of the largest, equal ones by index."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        logits = logits.contiguous()
        bias = None if bias is None else bias.contiguous()
        op = backend("moe.router", logits)
        choice = top_k, scoring, num_groups, top_groups
        experts, weights = op.forward(logits, bias, digest, *choice, normalize, scale, round_to, salt)
        ctx.save_for_backward(logits, experts)
        ctx.settings = top_k, scoring, normalize, scale
        ctx.mark_non_differentiable(experts)
        return experts, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _dexperts: None, dweights: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        dlogits = backend("moe.router", logits).backward(dweights.contiguous(), logits, experts, *ctx.settings)
        return dlogits, *(None,) * 10
