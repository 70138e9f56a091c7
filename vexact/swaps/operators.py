"""Which operators of a forward are torch's own, and could give a token other bits in other company."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OURS = "vexact.ops."
_TORCH = "torch."


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Data that moves and does not change
_MOVES = _names("""
    _local_scalar_dense _reshape_alias _to_copy _unsafe_view arange cat clone constant_pad_nd copy_ embedding
    empty empty_like empty_strided fill_ flip full full_like gather index index_copy index_select lift_fresh masked_fill
    new_empty new_empty_strided new_full new_ones new_zeros ones ones_like repeat roll scalar_tensor
    stack tril triu unsqueeze_copy where zero_ zeros zeros_like
""")
# Elementwise and rounded as IEEE 754 says, whatever the loop around it
_ROUNDED = _names("""
    abs add add_ bitwise_and bitwise_not bitwise_or clamp clamp_ clamp_max clamp_min div div_ eq ge gt isfinite
    isinf isnan le logical_and logical_not logical_or lt maximum minimum mul mul_ ne neg reciprocal relu rsub
    sign sqrt sub sub_ threshold
""")


@dataclass(frozen=True, slots=True)
class ForeignOperator:
    """One operator of torch, and who called it."""

    operator: str  # aten name
    module: str  # qualified name and class
    source: str  # file and line

    def __str__(self) -> str:
        return f"{self.module} computes {self.operator} ({self.source})"


def check_operators(model: nn.Module, forward: Callable[[], object]) -> None:
    """Runs ``forward``, which calls ``model``, and looks at every operator that it reaches outside of ours.

    Raises:
        ValueError: some of them sum or multiply across elements, or depend on the place of an element on the CPU.
    """
    found = foreign_operators(model, forward)
    if found:
        raise ValueError(describe(type(model).__name__, [str(one) for one in found]))


def foreign_operators(model: nn.Module, forward: Callable[[], object]) -> list[ForeignOperator]:
    """The same as a list, in the order of the first call, one entry per operator and class of module."""
    watch = _Watch({id(module): name for name, module in model.named_modules()})
    with torch.no_grad(), watch:
        forward()
    return list(watch.found.values())


def describe(what: str, reasons: list[str]) -> str:
    """One message for everything that stands in the way of ``what``."""
    shown = reasons[:8] + [f"and {len(reasons) - 8} more"] * (len(reasons) > 8)
    return f"{what} cannot be made exact: " + "; ".join(shown)


class _Watch(TorchDispatchMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: dict[tuple[str, str], ForeignOperator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _keeps_bits(func, args, kwargs):
            frames = list(_frames(sys._getframe(1)))
            if not any(str(frame.f_globals.get("__name__")).startswith(_OURS) for frame in frames):
                self._note(str(func.overloadpacket), frames)
        return func(*args, **kwargs)

    def _note(self, operator: str, frames: list[FrameType]) -> None:
        module = next((m for frame in frames if (m := _module(frame)) is not None and id(m) in self.names), None)
        outside = (f for f in frames if not str(f.f_globals.get("__name__")).startswith(_TORCH))
        frame = next(outside, frames[0])
        kind = "the forward itself" if module is None else type(module).__name__.removeprefix("Invariant")
        name = self.names[id(module)] if module is not None else ""
        source = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.found.setdefault((operator, kind), ForeignOperator(operator, f"{name} ({kind})" if name else kind, source))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> nn.Module | None:
    candidate = frame.f_locals.get("self")
    return candidate if isinstance(candidate, nn.Module) else None


def _keeps_bits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an element of the result depends on nothing but its own operands."""
    name = func.overloadpacket.__name__
    if func.namespace != "aten":
        return False
    if func.is_view or name in _MOVES or name in ("detach", "alias"):
        return True
    floats = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
    if not floats:
        return True
    if torch.Tag.pointwise not in func.tags:
        return False
    if name in _ROUNDED:
        return kwargs.get("alpha", 1) == 1
    if name == "pow" and args[1] == 2:
        return True  # a product
    return all(x.device.type != "cpu" or not _is_vector(x) for x in floats)


def _is_vector(x: Tensor) -> bool:
    return x.dim() > 0 and x.numel() > 1 and x.stride(-1) == 1
