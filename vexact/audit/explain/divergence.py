"""What the finder reports: the first place where rollout and trainer part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.audit.explain.recorder import BITS, Call

STAGES = (
    "weights",
    "inputs",
    "kv page",
    "operator",
    "route",
    "logits",
    "temperature",
    "truncation",
    "sampling",
    "training head",
    "generation state",
    "training state",
    "none",
)
"""In the order in which they are checked, a route among the operators; "none" means that nothing differs now."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the first unequal value."""

    value: float | int | str
    path: str = ""  # code path: prefill, chunk, decode, packed, ...
    shape: tuple[int, ...] = ()  # of the whole tensor the value is from
    dtype: str = ""
    is_right: bool | None = None  # equals what vexact.ops computes from the same arguments; None: not applicable

    @classmethod
    def of(cls, value: float | int | str, call: Call, is_right: bool | None = None) -> Side:
        return cls(value, call.path, call.shape, call.dtype, is_right)

    def line(self, name: str, op: str) -> str:
        parts = [f"  {name:<8} {self.value!r:<24}", self.path, f"{self.dtype}{list(self.shape)}" if self.shape else ""]
        if self.is_right is not None:
            parts.append(f"{'equals' if self.is_right else 'differs from'} vexact.ops.{op} on the same arguments")
        return "  ".join(part for part in parts if part).rstrip()


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference between rollout and trainer for one request, in the order of ``STAGES``."""

    stage: str
    summary: str  # one sentence
    request_id: str
    where: str = ""  # tensor, operator and module
    op: str = ""
    layer: int | None = None
    expert: int | None = None  # whose row or weight it is
    position: int | None = None  # of the token in the whole sequence
    response_position: int | None = None  # of the token that this row predicts; None inside the prompt
    element: tuple[int, ...] = ()
    rollout: Side | None = None
    trainer: Side | None = None
    ulp: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        return self.stage != "none"

    def describe(self) -> str:
        """A few lines for a terminal or a log."""
        lines = [f"first divergence: {self.stage}: {self.summary}", f"  request  {self.request_id}"]
        if self.where:
            parts = [self.where, *(f"{name} {i}" for name, i in self._indices() if i is not None)]
            lines.append(f"  where    {', '.join(parts)}")
        if self.position is not None:
            predicted = "" if self.response_position is None else f", predicts response token {self.response_position}"
            lines.append(f"  token    position {self.position}{predicted}")
        if self.element:
            lines.append(f"  element  {list(self.element)}" + (f", {self.ulp} ulp apart" if self.ulp else ""))
        lines += [side.line(name, self.op) for name, side in self._sides() if side is not None]
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])

    def _indices(self) -> tuple[tuple[str, int | None], ...]:
        return ("layer", self.layer), ("expert", self.expert)

    def _sides(self) -> tuple[tuple[str, Side | None], tuple[str, Side | None]]:
        return ("rollout", self.rollout), ("trainer", self.trainer)


@dataclass(frozen=True, slots=True)
class Element:
    """The first element in which two tensors of one shape and dtype differ."""

    index: tuple[int, ...]
    rollout: float
    trainer: float
    ulp: int
    count: int


def first_element(rollout: Tensor, trainer: Tensor) -> Element | None:
    """Compares bits; None if all are equal.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if rollout.shape != trainer.shape or rollout.dtype != trainer.dtype:
        raise ValueError(f"cannot compare {rollout.dtype}{tuple(rollout.shape)} with {trainer.dtype}{trainer.shape}")
    left, right = rollout.detach().cpu().contiguous(), trainer.detach().cpu().contiguous()
    a, b = (t.view(BITS[t.element_size()]).long() for t in (left, right))
    different = (a != b).nonzero()
    if not len(different):
        return None
    index = tuple(different[0].tolist())
    width = 8 * left.element_size() - 1
    ulp = abs(_ordered(int(a[index]), width) - _ordered(int(b[index]), width))
    return Element(index, float(left[index]), float(right[index]), ulp, len(different))


def same_bits(left: float, right: float) -> bool:
    """Two fp32 values, compared as int32."""
    a, b = torch.tensor([left, right], dtype=torch.float32).view(torch.int32).tolist()
    return a == b


def _ordered(bits: int, width: int) -> int:
    """Sign-magnitude float bits to integers in which neighbouring floats differ by 1."""
    return bits if bits >= 0 else -(bits & ((1 << width) - 1))
