"""VeOmni's loss slot: head and cross-entropy in one operator, or the log-probabilities that it makes the loss of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from veomni.utils.model_outputs import FusedLinearAuxOutput

from vexact.ops import linear_cross_entropy
from vexact.types import inverse_temperature
from vexact_veomni.parallel import refuse_sequence_parallelism

_UNSUPPORTED = ("teacher_topk_ids", "teacher_topk_log_probs", "log_prob_min_clamp", "label_smoothing", "weight")


def causal_lm_loss(
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    hidden_states: Tensor,
    weights: Tensor,
    return_log_probs: bool = False,
    temperature: Tensor | float = 1.0,
    inv_temperature: Tensor | None = None,
    min_logit: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor | None, None, FusedLinearAuxOutput | None]:
    """What VeOmni's ``ForCausalLMLoss`` returns, of ``hidden_states`` (B, T, H) and the head's ``weights`` (V, H).

    Args:
        labels: (B, T) int64; token t + 1 is what t predicts. shift_labels: the same, already moved.
        temperature: one number, or fp32, one per label (B, T); 0 is greedy, whose log-probabilities are those of 1.
        inv_temperature, min_logit: as a rollout reports them, (R,) fp32 for the kept labels: a factor in the place of
            ``temperature``, and truncation thresholds. FSDP2's mixed precision casts every floating input of the model;
            hand them over as int32 bits (``x.view(torch.int32)``).

    Returns:
        The mean over labels (or their sum over ``num_items_in_batch``); or, with ``return_log_probs``,
        log-probabilities and entropies (B, T) fp32, 0 where the label is ``ignore_index``.

    Raises:
        ValueError: an argument of VeOmni's that would change the result, one that lost bits, or sequence parallelism.
    """
    refuse_sequence_parallelism()
    given = [name for name in _UNSUPPORTED if more.get(name) is not None]
    if given:
        raise ValueError(f"vexact's loss slot does not support {given[0]}; remove it, or bind another loss")
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    flat = shift_labels.reshape(-1).to(hidden_states.device)
    rows = (flat != ignore_index).nonzero().squeeze(1)
    if inv_temperature is not None:
        inverse: Tensor | float = _fp32("inv_temperature", inv_temperature)
    elif isinstance(temperature, Tensor):
        given_each = _fp32("temperature", temperature)
        inverse_each = torch.where(given_each > 0, 1.0 / given_each, 1.0)
        inverse = inverse_each.expand_as(shift_labels).reshape(-1).index_select(0, rows)
    else:
        inverse = inverse_temperature(temperature)
    min_logit = None if min_logit is None else _fp32("min_logit", min_logit)
    hidden = hidden_states.flatten(0, -2).index_select(0, rows)
    out = linear_cross_entropy(hidden, weights, flat.index_select(0, rows), inverse, min_logit)
    if return_log_probs:
        empty = out.logprobs.new_zeros(flat.shape)
        log_probs, entropy = (empty.index_copy(0, rows, values).view(shift_labels.shape) for values in out)
        return None, None, FusedLinearAuxOutput(log_probs=log_probs, entropy=entropy)
    return -out.logprobs.sum() / (len(rows) if num_items_in_batch is None else num_items_in_batch), None, None


def _fp32(name: str, values: Tensor) -> Tensor:
    """fp32 from fp32 or its bits."""
    if values.dtype == torch.int32:
        return values.view(torch.float32)
    if values.dtype != torch.float32:
        raise ValueError(
            f"{name} arrived as {values.dtype}, which is not what was sent: FSDP2 casts every floating input; "
            f"pass {name}.view(torch.int32), fp32 as bits"
        )
    return values
