"""Our operators behind VeOmni's kernel slots, under the name ``vexact``."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import Tensor, nn
from veomni.arguments.arguments_types import OpsImplementationConfig
from veomni.ops.dispatch import OpSlot
from veomni.ops.kernel_registry import KERNEL_REGISTRY, HardwareRequirement, KernelSpec

from vexact import ops
from vexact.ops import hf
from vexact.swaps.mlp import gated
from vexact.swaps.rotary import rotate
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
    ("cross_entropy_loss", "causal", causal_lm_loss),
)
SLOTS = ("rms_norm", "rotary_pos_emb", "swiglu_mlp")  # chosen by configuration; the loss is bound afterwards


def register() -> None:
    """Adds the kernels to VeOmni's registry and ``triton-invariant`` to transformers; repeating it is harmless."""
    hf.register()
    for op, variant, function in _KERNELS:
        if NAME not in KERNEL_REGISTRY.list_available(op, variant):
            KERNEL_REGISTRY.register(KernelSpec(NAME, op, variant, lambda f=function: f, HardwareRequirement("any")))


def ops_implementation(attn_impl: str | None = None, slots: tuple[str, ...] = SLOTS) -> OpsImplementationConfig:
    """VeOmni's choice of kernels: ours in ``slots``, eager torch in all others.

    Args:
        attn_impl: attention by name; by default what ``VEOMNI_ATTN_IMPLEMENTATION`` says, else ``triton-invariant``.
    """
    register()
    ours = {f"{slot}_implementation": NAME for slot in slots}
    eager = (
        "moe cross_entropy_loss load_balancing_loss rms_norm rotary_pos_emb swiglu_mlp rms_norm_gated causal_conv1d "
        "chunk_gated_delta_rule"
    )
    others = {f"{name}_implementation": "eager" for name in eager.split()}
    attention = attn_impl or os.environ.get(ATTENTION_VARIABLE) or hf.NAME
    return OpsImplementationConfig(attn_implementation=attention, **others | ours)


def slots_left(model: nn.Module) -> list[str]:
    """Slots of the model's file, the loss aside, that hold something else than our operator."""
    ours = {op: function for op, _, function in _KERNELS}
    slots = [slot for slot in vars(sys.modules[type(model).__module__]).values() if isinstance(slot, OpSlot)]
    left = sorted(
        {slot.op_name for slot in slots if slot.op_name in SLOTS and slot.bound_kernel() is not ours[slot.op_name]}
    )
    return [f"its slot {name} is not bound to {NAME}; build it with ops_implementation()" for name in left]


def bind_loss(model: nn.Module, name: str = NAME) -> None:
    """Puts the fused head and cross-entropy (``name="eager"``: torch's) into the slot of the model's file.

    VeOmni's configuration takes only names that it knows for this one, so it is bound when the model is there.

    Raises:
        ValueError: the model's file has no such slot.
    """
    module = sys.modules[type(model).__module__]
    slot = getattr(module, "veomni_causal_lm_loss", None)
    if slot is None:
        raise ValueError(
            f"{type(model).__name__} of {module.__name__} has no slot for the loss; it is none of VeOmni's own models"
        )
    slot.bind(name)
