"""Under Triton's interpreter every address that a kernel loads or stores must lie in one of its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
from rowwise import DEVICE
from torch import Tensor

from vexact.ops.kernels.launches import forget

INTERPRETED = DEVICE == "cpu"
collect_ignore = [] if INTERPRETED else ["test_interpreter_bounds.py"]  # a GPU has compute-sanitizer for this


@pytest.fixture(autouse=True)
def launches_are_new() -> Iterator[None]:
    """What a test has changed about launches ends with it."""
    yield
    forget()


@pytest.fixture(autouse=True)
def accesses_stay_in_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compute-sanitizer checks on a GPU. numpy would read a neighbour's memory and say nothing.

    The gaps of a strided view count as its memory. Atomic operations, of which there are none, are not seen.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    host_arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    spans = np.zeros((0, 2), np.uint64)
    kernel = ""

    def remember_arguments(self: Any, arguments: Any, named: dict[str, Any]) -> Any:
        nonlocal spans, kernel
        result = host_arguments(self, arguments, named)
        spans, kernel = merged(chain(result[0], result[1].values())), self.fn.__name__
        return result

    def check(pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, bool)]
        if addresses.size:
            outside = first_outside(addresses, pointers.get_element_ty().primitive_bitwidth // 8, spans)
            if outside:
                raise AssertionError(f"{kernel}: {outside}")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **hints: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **hints)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **hints: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **hints)

    monkeypatch.setattr(executor, "_init_args_hst", remember_arguments)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


def first_outside(addresses: np.ndarray, size: int, spans: np.ndarray) -> str | None:
    """The first access of ``size`` bytes that is not within one of the ``spans`` (N, 2), in words."""
    if not len(spans):
        return f"an access of {size} bytes by a kernel without tensors"
    addresses = addresses.astype(np.uint64)
    span = np.searchsorted(spans[:, 0], addresses, side="right") - 1
    ends = spans[span, 1]
    inside = (span >= 0) & (addresses < ends) & (ends - addresses >= np.uint64(size))
    if inside.all():
        return None
    outside = int(np.flatnonzero(~inside)[0])
    begin, end = (int(edge) for edge in spans[max(0, span[outside])])
    return f"an access of {size} bytes at byte {int(addresses[outside]) - begin} of an argument of {end - begin} bytes"


def merged(arguments: Iterable[Any]) -> np.ndarray:
    """[begin, end) in bytes of the memory of all tensors, ascending, those that overlap or touch made one."""
    spans: list[list[int]] = []
    for begin, end in sorted(extent(tensor) for tensor in tensors(arguments)):
        if spans and begin <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([begin, end])
    return np.array(spans, np.uint64).reshape(-1, 2)


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        base = getattr(argument, "base", argument)  # of a tensor descriptor
        if isinstance(base, tuple):
            yield from tensors(base)
        elif isinstance(base, Tensor) and base.numel():
            yield base


def extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
