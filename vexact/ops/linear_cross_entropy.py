"""LM head and log-probability in one op: the T x V logits never exist for the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import check_dims, check_floats, check_per_row
from vexact.ops.dispatch import backend


class LinearCrossEntropy(NamedTuple):
    """Per token, fp32 (T,): log-probability of the target and entropy (nats) of the kept distribution."""

    logprobs: Tensor
    entropy: Tensor


class OnePass(NamedTuple):
    """Result of :func:`linear_cross_entropy_one_pass`; gradients are of the summed token losses."""

    logprobs: Tensor  # (T,) fp32
    entropy: Tensor  # (T,) fp32
    dhidden: Tensor  # (T, H)
    dweight: Tensor  # (V, H)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor | float = 1.0,
    min_logit: Tensor | None = None,
) -> LinearCrossEntropy:
    """Log-probabilities and entropies of ``targets``, differentiable in ``hidden`` and ``weight``.

    The forward bits equal ``token_logprobs(linear(hidden, weight, out_dtype=fp32), targets, ...)``, the sampler's own.
    Tokens are processed in chunks; the backward recomputes each chunk's logits.

    Args:
        hidden: (T, H). weight: (V, H), same dtype. targets: (T,) int64.
        inv_temperature: (T,) fp32 or one number. min_logit: (T,) fp32 truncation threshold per token, None keeps all.

    Raises:
        ValueError: sizes or dtypes that do not fit together; on the CPU also a target outside the vocabulary.
    """
    inv_temperature, min_logit = _per_token(hidden, weight, targets, inv_temperature, min_logit)
    return LinearCrossEntropy(*_LinearCrossEntropy.apply(hidden, weight, targets, inv_temperature, min_logit))


def linear_cross_entropy_one_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dloss: Callable[[Tensor, slice], Tensor],
    inv_temperature: Tensor | float = 1.0,
    min_logit: Tensor | None = None,
) -> OnePass:
    """Forward and backward at once for losses that are elementwise in the log-probability.

    ``dloss(logprobs_chunk, tokens)`` returns d loss / d logprob for the tokens in the slice, so each chunk's gradient
    is taken while its logits are still there and nothing is recomputed.
    """
    inv_temperature, min_logit = _per_token(hidden, weight, targets, inv_temperature, min_logit)
    op = backend("linear_cross_entropy", hidden)
    return OnePass(*op.one_pass(hidden.contiguous(), weight, targets, inv_temperature, min_logit, dloss))


class TrainedCrossEntropy(NamedTuple):
    """Result of :func:`linear_cross_entropy_trained`."""

    logprobs: Tensor  # (T,) fp32, without gradient
    entropy: Tensor  # (T,) fp32, without gradient
    surrogate: Tensor  # scalar 0, whose gradient is that of the summed token losses


def linear_cross_entropy_trained(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dloss: Callable[[Tensor, slice], Tensor],
    inv_temperature: Tensor | float = 1.0,
    min_logit: Tensor | None = None,
) -> TrainedCrossEntropy:
    """:func:`linear_cross_entropy_one_pass` as a part of an autograd graph: call ``surrogate.backward()``, once.

    The log-probabilities have the bits of :func:`linear_cross_entropy`; the gradients, taken in its forward, wait for
    the backward.
    """
    inv_temperature, min_logit = _per_token(hidden, weight, targets, inv_temperature, min_logit)
    return TrainedCrossEntropy(*_Trained.apply(hidden, weight, targets, inv_temperature, min_logit, dloss))


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        inv_temperature: Tensor,
        min_logit: Tensor,
        dloss: Callable[[Tensor, slice], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden.contiguous()
        op = backend("linear_cross_entropy", hidden)
        logprobs, entropy, dhidden, dweight = op.one_pass(hidden, weight, targets, inv_temperature, min_logit, dloss)
        ctx.save_for_backward(dhidden, dweight)
        ctx.mark_non_differentiable(logprobs, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, logprobs.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _dlogprobs: None, _dentropy: None, scale: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden.mul_(scale), dweight.mul_(scale), None, None, None, None


def _per_token(
    hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor | float, min_logit: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_dims("linear_cross_entropy", 2, "two axes", hidden=hidden, weight=weight)
    check_floats("linear_cross_entropy", hidden=hidden, weight=weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden has H={hidden.shape[1]} but weight is {tuple(weight.shape)}, "
            f"expected (V, {hidden.shape[1]})"
        )
    num_tokens = hidden.shape[0]
    if not isinstance(inv_temperature, Tensor):
        inv_temperature = torch.full((num_tokens,), inv_temperature, dtype=torch.float32, device=hidden.device)
    if min_logit is None:
        min_logit = torch.full((num_tokens,), float("-inf"), dtype=torch.float32, device=hidden.device)
    check_per_row("linear_cross_entropy", num_tokens, torch.int64, targets=targets)
    rows = {"inv_temperature": inv_temperature, "min_logit": min_logit}
    check_per_row("linear_cross_entropy", num_tokens, torch.float32, **rows)
    return inv_temperature, min_logit


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, min_logit: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = hidden.contiguous()
        op = backend("linear_cross_entropy", hidden)
        logprobs, lse, entropy = op.forward(hidden, weight, targets, inv_temperature, min_logit)
        ctx.save_for_backward(hidden, weight, targets, inv_temperature, min_logit, lse, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden = ctx.saved_tensors[0]
        if dlogprobs is None:
            if dentropy is None:
                return None, None, None, None, None
            dlogprobs = torch.zeros_like(dentropy)
        op = backend("linear_cross_entropy", hidden)
        dhidden, dweight = op.backward(dlogprobs, dentropy, *ctx.saved_tensors)
        return dhidden, dweight, None, None, None
