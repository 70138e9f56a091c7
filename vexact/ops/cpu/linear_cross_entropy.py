"""CPU twin of linear_cross_entropy: chunks of tokens through the LM head, never all of T x V."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vexact.ops.cpu.linear import forward as linear_forward
from vexact.ops.cpu.logprob import dropped, token_logprobs
from vexact.ops.cpu.product import product

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of fp32 logits at a time; does not touch the bits


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H), (V, H) -> logprobs, lse, entropy, each (T,) fp32."""
    logprobs, lse, entropy = (torch.empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    for tokens in _chunks(hidden, weight):
        logits = linear_forward(hidden[tokens], weight, None, torch.float32)
        stats = token_logprobs(logits, targets[tokens], inv_temperature[tokens], min_logit[tokens])
        logprobs[tokens], lse[tokens], entropy[tokens] = stats
    return logprobs, lse, entropy


def backward(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    lse: Tensor,
    entropy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients (T, H) and (V, H); each chunk's logits are recomputed."""
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for tokens in _chunks(hidden, weight):
        logits = linear_forward(hidden[tokens], weight, None, torch.float32)
        dlogits = _dlogits(
            logits,
            targets[tokens],
            inv_temperature[tokens],
            min_logit[tokens],
            lse[tokens],
            entropy[tokens],
            dlogprobs[tokens],
            None if dentropy is None else dentropy[tokens],
        )
        dhidden[tokens] = product(dlogits, weight.float()).to(hidden.dtype)
        dweight.addmm_(dlogits.T, hidden[tokens].float())
    return dhidden, dweight.to(weight.dtype)


def one_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    dloss: Callable[[Tensor, slice], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs (T,), entropy (T,), dhidden (T, H), dweight (V, H); each chunk's logits are used while they exist."""
    out = torch.empty(2, hidden.shape[0], dtype=torch.float32)
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for tokens in _chunks(hidden, weight):
        logits = linear_forward(hidden[tokens], weight, None, torch.float32)
        args = targets[tokens], inv_temperature[tokens], min_logit[tokens]
        logprobs, lse, entropy = token_logprobs(logits, *args)
        out[:, tokens] = torch.stack((logprobs, entropy))
        dlogits = _dlogits(logits, *args, lse, entropy, dloss(logprobs, tokens), None)
        dhidden[tokens] = product(dlogits, weight.float()).to(hidden.dtype)
        dweight.addmm_(dlogits.T, hidden[tokens].float())
    return out[0], out[1], dhidden, dweight.to(weight.dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    step = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        yield slice(start, min(start + step, hidden.shape[0]))


def _dlogits(
    logits: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    lse: Tensor,
    entropy: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
) -> Tensor:
    """d/dlogit = inv_T * (dlogp * (onehot - p) - dH * p * (log p + H)); p is 0 outside the kept set."""
    logp = logits * inv_temperature.unsqueeze(1) - lse.unsqueeze(1)
    probs = torch.exp(logp).masked_fill_(dropped(logits, targets, min_logit), 0.0)
    grad = probs * -dlogprobs.unsqueeze(1)
    if dentropy is not None:
        grad -= dentropy.unsqueeze(1) * probs * (logp.clamp_min(-1e4) + entropy.unsqueeze(1))
    grad[torch.arange(len(targets)), targets] += dlogprobs
    return grad.mul_(inv_temperature.unsqueeze(1))
