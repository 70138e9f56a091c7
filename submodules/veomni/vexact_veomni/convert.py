"""Exchanges on a built model what VeOmni has no slot for, and looks whether anything else is left."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from vexact.ops import hf
from vexact.swaps.invariant import dropouts, swap_modules
from vexact.swaps.operators import check_operators, describe
from vexact_veomni.parallel import refuse_sequence_parallelism
from vexact_veomni.slots import bind_loss, slots_left

Model = TypeVar("Model", bound=nn.Module)

KINDS = ("linear", "embedding", "table")


def convert(model: Model, check: bool = True) -> Model:
    """Exchanges linear layers, head, embedding and rotary table, and binds the loss slot, in place.

    Call it after ``build_foundation_model(ops_implementation=ops_implementation())`` and before FSDP2 wraps the model;
    weights may still be on the meta device. Parameters, names and state dict stay as they are. The loss slot belongs to
    the model's file, so all models of a family in one process share it.

    Raises:
        ValueError: what cannot be exchanged, by name; attention or slots that are not ours; sequence parallelism;
            dropout. ``check=False`` leaves all but the first unseen.
    """
    refuse_sequence_parallelism()
    reasons = swap_modules(model, KINDS)
    if check:
        attention = model.config._attn_implementation
        if attention != hf.NAME:
            reasons.append(f"its attention is {attention}; set VEOMNI_ATTN_IMPLEMENTATION={hf.NAME} or leave it unset")
        reasons += slots_left(model) + dropouts(model)
    if reasons:
        raise ValueError(describe(type(model).__name__, reasons))
    bind_loss(model)
    if check and next(model.parameters()).device.type != "meta":
        check_forward(model)
    return model


def check_forward(model: nn.Module) -> None:
    """Runs a few tokens through the model and its loss.

    Raises:
        ValueError: torch's own operators compute something that our operators should.
    """
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    check_operators(model, lambda: model(input_ids=ids, labels=ids, return_log_probs=True, use_cache=False))
