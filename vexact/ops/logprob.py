"""The one definition of a token's log-probability that sampler and trainer share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vexact.ops.checks import check_dims, check_per_row
from vexact.ops.dispatch import backend


class TokenLogprobs(NamedTuple):
    """Per row, fp32 (B,): log-probability of the given token; log-sum-exp and entropy (nats) of the kept set."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, inv_temperature: Tensor, min_logit: Tensor) -> TokenLogprobs:
    """Log-probability of ``token_ids`` under the tempered, truncated softmax of ``logits``.

    With z = logit * inv_temperature and K = {logit >= min_logit} and the token: ``logprob = z[token] - logsumexp(z
    over K)``. A threshold comes from the weights that sampled; under others the token may lie below it, and counts.
    A row's bits depend on that row and V only.

    Args:
        logits: (B, V) fp32. token_ids: (B,) int64. inv_temperature, min_logit: (B,) fp32; -inf keeps every token.

    Raises:
        ValueError: logits are not fp32, or tensors of other shapes or dtypes; on the CPU also an id outside the row.
    """
    if logits.dtype != torch.float32:
        raise ValueError(
            f"token_logprobs: logits are {logits.dtype}; they must stay fp32 (linear(..., out_dtype=fp32))"
        )
    check_dims("token_logprobs", 2, "(B, V)", logits=logits)
    check_per_row("token_logprobs", logits.shape[0], torch.int64, token_ids=token_ids)
    rows = {"inv_temperature": inv_temperature, "min_logit": min_logit}
    check_per_row("token_logprobs", logits.shape[0], torch.float32, **rows)
    return TokenLogprobs(*backend("logprob", logits).token_logprobs(logits, token_ids, inv_temperature, min_logit))


def token_logprobs_reference(
    logits: Tensor, token_ids: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> TokenLogprobs:
    """The definition in fp64."""
    z = logits.double() * inv_temperature.double().unsqueeze(1)
    dropped = (logits < min_logit.unsqueeze(1)).scatter(1, token_ids.unsqueeze(1), False)
    z = z.masked_fill(dropped, float("-inf"))
    logp = torch.log_softmax(z, dim=-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return TokenLogprobs(logp.gather(1, token_ids.unsqueeze(1)).squeeze(1), torch.logsumexp(z, dim=-1), entropy)
