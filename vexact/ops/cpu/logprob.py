"""CPU twin of token_logprobs."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.checks import out_of_range
from vexact.ops.cpu.reduce import tree_sum


def token_logprobs(
    logits: Tensor, token_ids: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, V) fp32 -> logprobs, lse, entropy, each (B,) fp32."""
    z = logits * inv_temperature.unsqueeze(1)
    try:
        chosen = z.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    except (IndexError, RuntimeError):
        raise out_of_range("token_logprobs", "token_ids", token_ids, logits.shape[1]) from None
    z.masked_fill_(dropped(logits, token_ids, min_logit), float("-inf"))
    top = z.amax(-1, keepdim=True)
    shifted = z - top
    weights = torch.exp(shifted)
    total = tree_sum(weights)
    log_total = torch.log(total)
    # H = log sum w - (sum w * (z - max)) / sum w; underflowed weights contribute 0 even where z is -inf
    entropy = log_total - tree_sum(weights * shifted.clamp_min(-1e4)) / total
    lse = top.squeeze(1) + log_total
    return chosen - lse, lse, entropy


def dropped(logits: Tensor, token_ids: Tensor, min_logit: Tensor) -> Tensor:
    """(B, V): whether a logit is outside its row's kept set, to which the row's own token always belongs."""
    return (logits < min_logit.unsqueeze(1)).scatter_(1, token_ids.unsqueeze(1), False)
