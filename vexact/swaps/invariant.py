"""``make_invariant``: an instance of a transformers model whose every token has the bits it has alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vexact.ops import hf
from vexact.swaps.classes import Swapped, below
from vexact.swaps.linear import Embedding, Head, Linear
from vexact.swaps.logit_router import choose_in_router
from vexact.swaps.mlp import activation_class, mlp_class
from vexact.swaps.norm import norm_class
from vexact.swaps.operators import describe, foreign_operators
from vexact.swaps.rotary import RotaryTable, is_rotary, rotating_class, tables_of
from vexact.swaps.router import Router, router_class
from vexact.swaps.shared_experts import shared_experts_class

Model = TypeVar("Model", bound=nn.Module)

_TRIAL_TOKENS = 12
_MOST_RELATIVE_CHANGE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
KINDS = ("linear", "embedding", "norm", "mlp", "router", "table", "rotary")
"""What may be exchanged; "rotary" is the layer that reads the "table"."""


def make_invariant(model: Model) -> Model:
    """Exchanges the operators of a causal language model of transformers for ours, in place.

    Afterwards hidden states and logits (now fp32) of a token have the same bits alone, in a batch, packed
    (``position_ids`` that restart), decoded from a ``DynamicCache``, in training and in evaluation; for Qwen3, Qwen2
    and Llama they are those of this package's rollout. Parameters, names and the state dict stay as they are, nothing
    outside of this instance changes, and a second call does nothing. Convert before FSDP2 wraps the model. A loss that
    the model computes from ``labels`` is torch's own; take :func:`vexact.ops.linear_cross_entropy`.

    What is exchanged: linear layers and the LM head, embeddings, RMS norms, gated SiLU layers, other activations,
    routers and experts, the rotary embedding with its table, attention. Each must compute what it computed before,
    which is tried on small tensors; then the whole model runs a few tokens before and after, and every operator it
    still reaches outside of ours is looked at. A model that fails is left as it was.

    Raises:
        ValueError: what cannot be exchanged, by module, operator and source line; dropout; weights on the meta device.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "make_invariant runs a few tokens, but the model is on the meta device; load its weights first"
        )
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            f"{type(model).__name__} is no causal language model of transformers; see AutoModelForCausalLM"
        )
    undo: list[Callable[[], None]] = []
    try:
        reasons = _convert(model, undo)
        if reasons:
            raise ValueError(describe(type(model).__name__, reasons))
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return model


def _convert(model: Any, undo: list[Callable[[], None]]) -> list[str]:
    try:
        before = _trial(model)
    except Exception as error:  # of any class: its configuration may be no model at all
        return [f"as it is, it cannot run {_TRIAL_TOKENS} tokens: {error}"]
    random = dropouts(model)
    reasons = swap_modules(model, undo=undo)
    _attend(model, undo)
    return random + (reasons or _look_at_all(model, before))


def _look_at_all(model: Any, before: Tensor) -> list[str]:
    """What is left of torch's own operators, or whether the logits became others than ``before``."""
    found: list[Tensor] = []
    try:
        foreign = foreign_operators(model, lambda: found.append(_trial(model)))
    except Exception as error:  # of any class: an operator of ours refused, or the model expects what a module was
        return [f"with its modules exchanged it stops: {error}"]
    if foreign:
        return [str(one) for one in foreign]
    change = _relative_change(found[0], before, any(isinstance(module, Router) for module in model.modules()))
    if not change <= _MOST_RELATIVE_CHANGE[_dtype(model)]:
        return [f"its logits change by {change:.2g} of their size, so an exchanged module computes something else"]
    return []


def _relative_change(after: Tensor, before: Tensor, chooses_experts: bool) -> float:
    """Of logits (1, T, V). With experts the middle one of the tokens': a score that was rounded may choose others for
    some."""
    if not chooses_experts:
        return float((after - before).norm() / before.norm())
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1)).median())


def swap_modules(model: Any, kinds: tuple[str, ...] = KINDS, undo: list[Callable[[], None]] | None = None) -> list[str]:
    """Exchanges the modules of these kinds. Returns what stands in the way, and appends to ``undo`` how to go back.

    Whether nothing is left that should have been exchanged is for :func:`.operators.check_operators` to say.
    """
    undo = [] if undo is None else undo
    reasons: dict[str, str] = {}
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, (Swapped, RotaryTable)):
            continue
        try:
            if "table" in kinds and is_rotary(module):
                _put_table(model, name, module, undo)
                continue
            if "router" in kinds and (back := choose_in_router(module)):
                undo.append(back)
                continue
            swap = _class_for(module, kinds, module is head)
        except ValueError as error:
            reasons.setdefault(f"{type(module).__name__}: {error}", f"{name} ({type(module).__name__}): {error}")
            continue
        if swap is not None:
            undo.append(_class_back(module))
            module.__class__ = swap
    return list(reasons.values())


def _class_for(module: nn.Module, kinds: tuple[str, ...], is_head: bool) -> type | None:
    if isinstance(module, nn.Linear):
        return below(Head if is_head else Linear, type(module)) if "linear" in kinds else None
    if isinstance(module, nn.Embedding):
        return below(Embedding, type(module)) if "embedding" in kinds else None
    found = norm_class(module) if "norm" in kinds else None
    if found is None and "mlp" in kinds:
        found = mlp_class(module) or activation_class(module)
    if found is None and "router" in kinds:
        found = router_class(module) or shared_experts_class(module)
    if found is None and "rotary" in kinds:
        found = rotating_class(module)
    return found


def _put_table(model: nn.Module, name: str, rotary: nn.Module, undo: list[Callable[[], None]]) -> None:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    config: Any = rotary.config
    tables = tables_of(rotary, config.max_position_embeddings)
    undo.append(lambda: parent.add_module(child, rotary))
    parent.add_module(child, RotaryTable(tables))


def _class_back(module: nn.Module) -> Callable[[], None]:
    original = type(module)

    def back() -> None:
        module.__class__ = original

    return back


def _attend(model: Any, undo: list[Callable[[], None]]) -> None:
    old = model.config._attn_implementation
    undo.append(lambda: model.set_attn_implementation(old))
    hf.register()
    model.set_attn_implementation(hf.NAME)
    if model._can_set_experts_implementation():
        experts = model.config._experts_implementation
        undo.append(lambda: model.set_experts_implementation(experts))
        model.set_experts_implementation(hf.NAME)


def dropouts(model: nn.Module) -> list[str]:
    """What drops or changes numbers at random while training, by name."""
    noisy = [
        f"{name} ({type(module).__name__}) multiplies by noise; set router_jitter_noise to 0"
        for name, module in model.named_modules()
        if getattr(module, "jitter_noise", 0.0)
    ][:1]
    layers = [
        (name, module, module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0))
        for name, module in model.named_modules()
    ]
    active = [(name, module, p) for name, module, p in layers if isinstance(p, (int, float)) and p > 0]
    if not active:
        return noisy
    name, module, p = active[0]
    drop = f"{name} ({type(module).__name__}) and {len(active) - 1} more drop a share of {p:g} at random; set it to 0"
    return [drop, *noisy]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


@torch.no_grad()
def _trial(model: Any) -> Tensor:
    """Logits (1, T, V) of a few tokens, fp32."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(_TRIAL_TOKENS, device=next(model.parameters()).device)[None] * 7919 % vocabulary
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was_training)
    return logits.float()
