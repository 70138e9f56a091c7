"""Which operators a model runs on: the invariant ones, or torch's own for a deliberate baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakSet

from torch import nn

import vexact.ops as invariant
from vexact.ops import stock
from vexact.ops.stock import flash, moe, paged

OPS = ("invariant", "stock")
STOCK_ATTENTION: dict[str, Callable[..., Any]] = {
    "sdpa": stock.attention,
    "flash_attention_2": flash.flash_attention_2,
    "flash_attention_3": flash.flash_attention_3,
}
INVARIANT_ATTENTION = ("triton-invariant",)

# stock.attention and the experts' products by expert look at lengths on the host
_replayable: WeakSet[Callable[..., Any]] = WeakSet(
    (
        *(stock.linear, stock.rms_norm, stock.add_rms_norm, stock.swiglu),
        *(stock.rope, stock.qk_norm_rope, stock.latent_rope),
        *(stock.embedding, paged.paged_flash_attention_2),
        *(stock.route, stock.group_tokens, stock.route_and_group, stock.combine),
        *(moe.grouped_product, moe.grouped_product_swiglu),
    )
)


@dataclass(frozen=True, slots=True)
class OpSet:
    """The operators a decoder calls, with the signatures of :mod:`vexact.ops`."""

    linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    qk_norm_rope: Callable[..., Any]
    latent_rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    embedding: Callable[..., Any]
    attention: Callable[..., Any]
    route: Callable[..., Any]
    group_tokens: Callable[..., Any]
    route_and_group: Callable[..., Any]
    grouped_linear: Callable[..., Any]
    grouped_swiglu: Callable[..., Any]
    combine: Callable[..., Any]

    @property
    def fuses_routing(self) -> bool:
        """Whether ``route_and_group`` stands for ``route`` and ``group_tokens``: not where one of them was replaced."""
        return any(self.route is of.route and self.group_tokens is of.group_tokens for of in (invariant, stock))

    @property
    def fuses_experts(self) -> bool:
        """Whether ``few_tokens`` stands for the operators of a layer of experts: not where one of them was replaced."""
        return all(getattr(self, name) is getattr(invariant, name) for name in _EXPERT_OPS)

    @property
    def fuses_swiglu(self) -> bool:
        """Whether ``linear_swiglu`` stands for ``linear`` and ``swiglu``."""
        return self.linear is invariant.linear and self.swiglu is invariant.swiglu

    @property
    def fuses_cache(self) -> bool:
        """Whether ``rope_to_cache`` and ``cached_attention`` stand for the rotation and ``attention`` with a cache."""
        return (
            self.rope is invariant.rope
            and self.qk_norm_rope is invariant.qk_norm_rope
            and self.attention is invariant.attention
        )


_EXPERT_OPS = ("route", "group_tokens", "route_and_group", "grouped_swiglu", "grouped_linear", "combine")
OP_NAMES = tuple(field.name for field in fields(OpSet))


def op_set(ops: str = "invariant", attn_impl: str = "triton-invariant") -> OpSet:
    """Builds the operator set. Attention is always the one named, also beside stock operators.

    Raises:
        ValueError: unknown ``ops`` or ``attn_impl``.
    """
    if ops not in OPS:
        raise ValueError(f"unknown operator set {ops!r}; use one of {', '.join(OPS)}")
    if attn_impl not in (*INVARIANT_ATTENTION, *STOCK_ATTENTION):
        known = ", ".join((*INVARIANT_ATTENTION, *STOCK_ATTENTION))
        raise ValueError(f"unknown attention implementation {attn_impl!r}; use one of {known}")
    source = vars(invariant) if ops == "invariant" else vars(stock)
    chosen = {name: source[name] for name in OP_NAMES}
    return OpSet(**chosen | {"attention": STOCK_ATTENTION.get(attn_impl, invariant.attention)})


def attention_name(model: nn.Module) -> str:
    """What attention the layers run, by the names users know it by."""
    names = {op: name for name, op in STOCK_ATTENTION.items()} | {invariant.attention: INVARIANT_ATTENTION[0]}
    sets = [ops for module in model.modules() if isinstance(ops := getattr(module, "ops", None), OpSet)]
    return " and ".join(dict.fromkeys(names.get(ops.attention, "another") for ops in sets))


def set_ops(model: nn.Module, ops: OpSet) -> None:
    """Gives every submodule that calls operators (``model`` included) this operator set, in place."""
    for module in model.modules():
        if isinstance(getattr(module, "ops", None), OpSet):
            module.__dict__["ops"] = ops  # past the setter, which is typed for parameters and submodules


def replayable(ops: OpSet) -> bool:
    """Whether a CUDA graph may stand for every one of the operators: the invariant ones, most stock ones, those marked.

    Such an operator never waits for the device, and does nothing on the host that has to happen again in every call.
    """
    return all(_is_replayable(getattr(ops, name)) for name in OP_NAMES)


def mark_replayable(op: Callable[..., Any], *, if_is: Callable[..., Any]) -> Callable[..., Any]:
    """Declares ``op`` replayable if ``if_is``, the operator it calls, is. Returns ``op``."""
    if _is_replayable(if_is):
        _replayable.add(op)
    return op


def _is_replayable(op: Callable[..., Any]) -> bool:
    return op in _replayable or any(op is getattr(invariant, name) for name in OP_NAMES)
