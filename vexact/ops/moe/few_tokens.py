"""A whole layer of experts behind the router's logits, for inference with a few tokens: two launches where it pays."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.checks import check_per_row
from vexact.ops.moe.route import check_route

_MOST_CHOSEN = 16  # experts of a token: their rows are one tile


def takes_few(x: Tensor, top_k: int, down: Tensor) -> bool:
    """Whether :func:`few_tokens` has kernels of its own for rows ``x`` (T, H) and matrices ``down`` (E, H, I).

    They are for 16-bit numbers and one or two tokens, without gradients or a compiler.
    """
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    from vexact.ops.kernels.moe import few

    return x.shape[0] <= few.UNASKED and fits(x, top_k, down)


def fits(x: Tensor, top_k: int, down: Tensor) -> bool:
    """Whether :func:`few_tokens` can be called."""
    from vexact.ops.kernels.moe import few

    return (
        0 < x.shape[0] <= few.TOKENS
        and top_k <= _MOST_CHOSEN
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == down.dtype
        and down.numel() > 0
    )


def few_tokens(
    x: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    shared: Tensor | None,
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
) -> Tensor:
    """``route_and_group``, ``grouped_swiglu``, ``grouped_linear`` and ``combine``, bit for bit. Not differentiable.

    Args:
        x: (T, H). logits: (T, E) fp32. gate_up: (E, 2I, H). down: (E, H, I). shared: (T, H) or None. The others are
            those of :func:`vexact.ops.route_and_group`.

    Returns:
        (T, H).

    Raises:
        ValueError: as these operators do; or for what does not fit (``fits`` tells).
    """
    settings = top_k, scoring, num_groups, top_groups, normalize, float(scale), round_to, salt
    from vexact.ops.kernels.moe import few

    if not fits(x, top_k, down):
        raise ValueError(
            f"few_tokens takes 1 to {few.TOKENS} rows of 16-bit numbers and at most {_MOST_CHOSEN} experts a token, "
            f"not x {tuple(x.shape)} of {x.dtype} and top_k={top_k}; take the operators one by one"
        )
    check_route("few_tokens", logits, bias, digest, *settings)
    _check_layer(x, logits, gate_up, down, shared)
    if padding is not None:
        check_per_row("few_tokens", logits.shape[0], torch.bool, padding=padding)
    return few.forward(
        x.contiguous(),
        logits.contiguous(),
        None if bias is None else bias.contiguous(),
        digest,
        None if padding is None else padding.contiguous(),
        gate_up.contiguous(),
        down.contiguous(),
        None if shared is None else shared.contiguous(),
        *settings,
    )


def _check_layer(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor | None) -> None:
    (tokens, hidden), experts = x.shape, logits.shape[1]
    expected = {
        "logits": (logits, (tokens, experts)),
        "gate_up": (gate_up, (experts, 2 * down.shape[2], hidden)),
        "down": (down, (experts, hidden, down.shape[2])),
        "shared": (shared, (tokens, hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"few_tokens: {name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"few_tokens: x is on {x.device} but {name} is on {tensor.device}")
        if name != "logits" and tensor.dtype != x.dtype:
            raise ValueError(f"few_tokens: x is {x.dtype} but {name} is {tensor.dtype}")
