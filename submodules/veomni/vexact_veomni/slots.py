"""Our operators behind VeOmni's kernel slots, under the name ``vexact``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from veomni.arguments.arguments_types import OpsImplementationConfig
from veomni.ops.dispatch import OpSlot
from veomni.ops.kernel_registry import KERNEL_REGISTRY, HardwareRequirement, KernelSpec

from vexact import ops
from vexact.ops import hf
from vexact.swaps.mlp import gated
from vexact.swaps.rotary import rotate
from vexact_veomni.experts import moe_experts
from vexact_veomni.loss import causal_lm_loss

NAME = "vexact"
ATTENTION_VARIABLE = "VEOMNI_ATTN_IMPLEMENTATION"


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Some of VeOmni's files pass positions that none of them reads."""
    return rotate(q, k, cos, sin, unsqueeze_dim)


def swiglu_mlp(mlp: Any, x: Tensor) -> Tensor:
    """The whole feed-forward module: that is what VeOmni hands to this slot."""
    return mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))


_KERNELS = (  # slot, variant, function of the module's own signature
    ("rms_norm", "standard", ops.rms_norm),
    ("rotary_pos_emb", "full", rotary),
    ("swiglu_mlp", "standard", swiglu_mlp),
    ("moe_experts", "standard", moe_experts),
    ("cross_entropy_loss", "causal", causal_lm_loss),
)
SLOTS = ("rms_norm", "rotary_pos_emb", "swiglu_mlp")  # chosen by configuration; experts and loss are bound afterwards
WITHOUT_SLOTS = ("deepseek_v3",)  # VeOmni's model takes no kernel of another's by configuration, and has no such slots


def register() -> None:
    """Adds the kernels to VeOmni's registry and ``triton-invariant`` to transformers; repeating it is harmless."""
    hf.register()
    for op, variant, function in _KERNELS:
        if NAME not in KERNEL_REGISTRY.list_available(op, variant):
            KERNEL_REGISTRY.register(KernelSpec(NAME, op, variant, lambda f=function: f, HardwareRequirement("any")))


def ops_implementation(
    attn_impl: str | None = None, slots: tuple[str, ...] = SLOTS, *, model_type: str | None = None
) -> OpsImplementationConfig:
    """VeOmni's choice of kernels: ours in ``slots``, eager torch in all others.

    Args:
        attn_impl: attention by name; by default what ``VEOMNI_ATTN_IMPLEMENTATION`` says, else ``triton-invariant``.
        model_type: that of config.json. VeOmni's model for ``deepseek_v3`` has no such slots, and refuses our name.
    """
    register()
    if model_type in WITHOUT_SLOTS:
        slots = ()
    ours = {f"{slot}_implementation": NAME for slot in slots}
    eager = (
        "moe cross_entropy_loss load_balancing_loss rms_norm rotary_pos_emb swiglu_mlp rms_norm_gated causal_conv1d "
        "chunk_gated_delta_rule"
    )
    others = {f"{name}_implementation": "eager" for name in eager.split()}
    attention = attn_impl or os.environ.get(ATTENTION_VARIABLE) or hf.NAME
    return OpsImplementationConfig(attn_implementation=attention, **others | ours)


def model_type_of(folder: Path) -> str | None:
    """What a checkpoint's config.json says; None if it says nothing, which whoever builds the model will refuse."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def slots_of(model: nn.Module) -> list[OpSlot]:
    """All that the model's file has."""
    return [slot for slot in vars(sys.modules[type(model).__module__]).values() if isinstance(slot, OpSlot)]


def slots_left(model: nn.Module) -> list[str]:
    """Slots that a configuration chooses for and that hold something else than our operator."""
    ours = {op: function for op, _, function in _KERNELS}
    slots = (slot for slot in slots_of(model) if slot.op_name in SLOTS)
    left = sorted({slot.op_name for slot in slots if slot.bound_kernel() is not ours[slot.op_name]})
    return [f"its slot {name} is not bound to {NAME}; build it with ops_implementation()" for name in left]


def bind(model: nn.Module, op: str, name: str = NAME) -> None:
    """Puts our operator (``name="eager"``: torch's) into a slot of the model's file.

    For the loss (``cross_entropy_loss``) and the experts (``moe_experts``): of these VeOmni's configuration takes only
    names that it knows, so they are bound when the model is there.

    Raises:
        ValueError: the model's file has no such slot.
    """
    variant = next(variant for known, variant, _ in _KERNELS if known == op)
    slots = [slot for slot in slots_of(model) if (slot.op_name, slot.variant) == (op, variant)]
    if not slots:
        raise ValueError(
            f"{type(model).__name__} of {type(model).__module__} has no slot {op} ({variant}), so VeOmni does not "
            "compute it in a way that can be exchanged"
        )
    slots[0].bind(name)
