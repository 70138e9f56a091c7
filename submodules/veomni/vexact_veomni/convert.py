"""Exchanges on a built model what VeOmni has no slot for, and looks whether anything else is left."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from vexact.ops import hf
from vexact.swaps.invariant import dropouts, swap_modules
from vexact.swaps.operators import check_operators, describe
from vexact.swaps.router import Router
from vexact.swaps.shared_experts import SharedExperts
from vexact_veomni.experts import experts_left, keep_biases, show_to_monitor, without_balance_loss
from vexact_veomni.parallel import refuse_expert_parallelism, refuse_sequence_parallelism
from vexact_veomni.slots import bind, slots_left, slots_of

Model = TypeVar("Model", bound=nn.Module)

KINDS = ("linear", "embedding", "table", "router")
"""Exchanged in every model: VeOmni has no slots for them."""
BY_SLOT = {"rms_norm": "norm", "swiglu_mlp": "mlp", "rotary_pos_emb": "rotary"}
"""Exchanged in a model whose file lacks the slot."""


def convert(model: Model, check: bool = True) -> Model:
    """Exchanges linear layers, head, embedding, routers and rotary table, and binds the slots of loss and experts, in
    place; in a model without the other slots also norms, feed-forwards and rotation.

    Call it after ``build_foundation_model(ops_implementation=ops_implementation())`` and before FSDP2 wraps the model;
    weights may still be on the meta device. Parameters, names and state dict stay as they are. Slots belong to the
    model's file, so all models of a family in one process share them.

    Raises:
        ValueError: what cannot be exchanged, by name; attention or slots that are not ours; sequence or expert
            parallelism; dropout; adapters on experts; a correction bias that was rounded. ``check=False`` looks for the
            first and for parallelism alone.
    """
    refuse_sequence_parallelism()
    refuse_expert_parallelism()
    on_meta = next(model.parameters()).device.type == "meta"
    if on_meta:
        keep_biases(model)
    reasons = swap_modules(model, kinds_of(model))
    if check:
        attention = model.config._attn_implementation
        if attention != hf.NAME:
            reasons.append(f"its attention is {attention}; set VEOMNI_ATTN_IMPLEMENTATION={hf.NAME} or leave it unset")
        reasons += slots_left(model) + dropouts(model) + experts_left(model)
    if reasons:
        raise ValueError(describe(type(model).__name__, reasons))
    bind(model, "cross_entropy_loss")
    bind_experts(model)
    if check and not on_meta:
        check_forward(model)
    return model


def kinds_of(model: nn.Module) -> tuple[str, ...]:
    """What to exchange of this model, as ``swap_modules`` calls it."""
    slots = {slot.op_name for slot in slots_of(model)}
    return (*KINDS, *(kind for op, kind in BY_SLOT.items() if op not in slots))


def bind_experts(model: nn.Module) -> None:
    """Binds the slot of experts, if there are any. Blocks with shared experts were exchanged with all they do."""
    if not any(isinstance(module, Router) for module in model.modules()):
        return
    if not any(isinstance(module, SharedExperts) for module in model.modules()):
        bind(model, "moe_experts")
    show_to_monitor(model)


def check_forward(model: nn.Module) -> None:
    """Runs a few tokens through the model and its loss.

    Raises:
        ValueError: torch's own operators compute something that our operators should.
    """
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    more = {"return_log_probs": True, "use_cache": False, **without_balance_loss(model)}
    check_operators(model, lambda: model(input_ids=ids, labels=ids, **more))
