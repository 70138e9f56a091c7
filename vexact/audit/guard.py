"""Finds reductions that reach the device outside the invariant operators.

For tests and ``vexact doctor``: it looks at every operator PyTorch dispatches and costs too much for training.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PACKAGE = Path(__file__).resolve().parents[1]
_OPS = f"{_PACKAGE / 'ops'}{os.sep}"
_STOCK = f"{_OPS}stock"  # others' operators under our signatures, deliberate baselines
_TRANSPARENT = (f"{Path(torch.__file__).parent}{os.sep}", __file__)  # whoever called into these is the author

# Names without the underscores that mark internal and in-place variants. Maxima and minima have no rounding, so their
# order is free; reductions of whole numbers are left out by their dtype.
_REDUCTIONS = """
    mm bmm addmm baddbmm addbmm mv addmv dot vdot inner matmul linear einsum tensordot bilinear
    sum nansum mean nanmean prod var std var_mean std_mean norm linalg_vector_norm linalg_matrix_norm foreach_norm
    cumsum cumprod logsumexp logcumsumexp softmax log_softmax softmax_backward_data log_softmax_backward_data
    native_layer_norm native_layer_norm_backward native_group_norm native_batch_norm fused_rms_norm
    fused_rms_norm_backward layer_norm rms_norm cross_entropy_loss nll_loss_forward
    convolution convolution_backward conv1d conv2d conv3d mkldnn_convolution
    index_add index_reduce scatter_add scatter_reduce embedding_bag embedding_dense_backward
    scaled_mm grouped_mm scaled_grouped_mm int_mm addmm_activation
"""
_PREFIXES = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention", "flex_attention")


@dataclass(frozen=True, slots=True)
class Finding:
    """A reduction outside ``vexact.ops``, and how often it ran."""

    op: str  # e.g. "aten.mm.default"
    where: str  # who called it: "models/decoder.py:121 forward"
    shapes: tuple[tuple[int, ...], ...]  # of its tensor arguments, the first time
    count: int

    def __str__(self) -> str:
        shapes = " x ".join(str(list(shape)) for shape in self.shapes)
        return f"{self.op} {shapes} from {self.where}, {self.count} times"


class ReductionGuard(TorchDispatchMode):
    """Context manager that records reductions over floating-point values whose caller is not an invariant operator.

    The caller is the innermost Python frame outside PyTorch; for what autograd runs in C++ that is whoever called
    ``backward``. Triton kernels are not dispatched, and neither are other packages' own CUDA extensions, which this
    cannot see.

    Example::

        with ReductionGuard() as guard:
            engine.generate(prompts, params)
        assert not guard.findings
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_inside = 0  # reductions of the invariant operators, to know that something was watched
        self._counts: Counter[tuple[str, str]] = Counter()
        self._shapes: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = {}

    @property
    def findings(self) -> list[Finding]:
        """What was found, in the order of its first appearance."""
        return [Finding(*key, self._shapes[key], count) for key, count in self._counts.items()]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_reduction(func, args, kwargs or {}) and _has_floats(result):
            self._record(str(func), args, _author(sys._getframe(1)))
        return result

    def _record(self, op: str, args: tuple[Any, ...], author: FrameType | None) -> None:
        file = author.f_code.co_filename if author is not None else ""
        if _is_invariant(file):
            self.num_inside += 1
            return
        where = (
            f"{'/'.join(Path(file).parts[-2:])}:{author.f_lineno} {author.f_code.co_name}"
            if author is not None
            else "unknown"
        )
        self._counts[op, where] += 1
        self._shapes.setdefault((op, where), tuple(tuple(arg.shape) for arg in args if isinstance(arg, Tensor)))


def watch(run: Callable[[], Any]) -> ReductionGuard:
    """Calls ``run`` under a guard and returns the guard."""
    with ReductionGuard() as guard:
        run()
    return guard


def _is_reduction(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    name = func.overloadpacket.__name__.strip("_")
    if name in ("index_put", "index_put_impl"):  # adds only when told to accumulate
        return bool(kwargs.get("accumulate", args[3] if len(args) > 3 else False))
    return name in _REDUCTIONS.split() or name.startswith(_PREFIXES)


def _has_floats(result: Any) -> bool:
    values = result if isinstance(result, (tuple, list)) else (result,)
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _author(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that is neither PyTorch's nor this module's."""
    while frame is not None and frame.f_code.co_filename.startswith(_TRANSPARENT):
        frame = frame.f_back
    return frame


def _is_invariant(file: str) -> bool:
    return file.startswith(_OPS) and not file.startswith(_STOCK)
