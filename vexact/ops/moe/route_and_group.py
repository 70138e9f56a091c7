"""Routes and their groups at once, for inference: few tokens take one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vexact.ops.checks import check_per_row
from vexact.ops.dispatch import backend
from vexact.ops.moe.groups import NO_EXPERT, ExpertGroups, group_tokens
from vexact.ops.moe.route import Routes, check_route, route


def route_and_group(
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
    padding: Tensor | None = None,
) -> tuple[Routes, ExpertGroups]:
    """:func:`route`, then :func:`group_tokens` of its experts, bit for bit. Differentiable as ``route`` is.

    Args:
        padding: (T,) bool, tokens that nobody reads: they have routes, but stand in no group.

    Raises:
        ValueError: as ``route`` does; a ``padding`` of another shape or dtype.
    """
    settings = top_k, scoring, num_groups, top_groups, normalize, float(scale), round_to, salt
    check_route("route_and_group", logits, bias, digest, *settings)
    if padding is not None:
        check_per_row("route_and_group", logits.shape[0], torch.bool, padding=padding)
    if torch.is_grad_enabled() and logits.requires_grad:
        return route_then_group(
            route,
            group_tokens,
            logits,
            bias,
            top_k=top_k,
            scoring=scoring,
            num_groups=num_groups,
            top_groups=top_groups,
            normalize=normalize,
            scale=scale,
            round_to=round_to,
            digest=digest,
            salt=salt,
            padding=padding,
        )
    experts, weights, *groups = backend("moe.router", logits).grouped_forward(
        logits.contiguous(),
        None if bias is None else bias.contiguous(),
        digest,
        None if padding is None else padding.contiguous(),
        *settings,
    )
    return Routes(experts, weights), ExpertGroups(*groups)


def route_then_group(
    route: Callable[..., Routes],
    group_tokens: Callable[[Tensor, int], ExpertGroups],
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Tensor | None = None,
    **settings: Any,
) -> tuple[Routes, ExpertGroups]:
    """:func:`route_and_group` by two operators of that kind."""
    routes = route(logits, bias, **settings)
    experts = routes.experts if padding is None else routes.experts.masked_fill(padding.unsqueeze(1), NO_EXPERT)
    return routes, group_tokens(experts, logits.shape[1])
