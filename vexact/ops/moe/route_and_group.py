"""Routes and their groups at once, for inference: few tokens take one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.dispatch import backend
from vexact.ops.moe.groups import ExpertGroups, group_tokens
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
) -> tuple[Routes, ExpertGroups]:
    """:func:`route`, then :func:`group_tokens` of its experts, bit for bit. Differentiable as ``route`` is.

    Raises:
        ValueError: as ``route`` does.
    """
    settings = top_k, scoring, num_groups, top_groups, normalize, float(scale), round_to, salt
    check_route("route_and_group", logits, bias, digest, *settings)
    if torch.is_grad_enabled() and logits.requires_grad:
        routes = route(
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
        )
        return routes, group_tokens(routes.experts, logits.shape[1])
    bias = None if bias is None else bias.contiguous()
    experts, weights, *groups = backend("moe.router", logits).grouped_forward(
        logits.contiguous(), bias, digest, *settings
    )
    return Routes(experts, weights), ExpertGroups(*groups)
