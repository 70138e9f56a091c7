"""Correct bfloat16 and a sequential matrix product for Triton's interpreter.

Triton's interpreter (`TRITON_INTERPRET=1`, all releases 3.4 to 3.9) keeps bfloat16 tensors as raw uint16 words
and then does integer arithmetic on them, and its float32 -> bfloat16 cast truncates. `install()` wraps the builder
operations so that every bfloat16 operand is widened to float32, and every bfloat16 result is rounded to nearest even,
which is what the hardware does.

It also replaces the matrix product, for every floating dtype. numpy hands it to a BLAS whose order of additions follows
the number of rows, so equal rows of a tall and a short tile differ in the last bit. Here K is walked in order from the
accumulator on, as on the tensor cores, so tests of tile-shape independence mean something.

Call it once, after setting `TRITON_INTERPRET=1` and before launching a kernel. Not covered: bfloat16 atomics, and
reductions or scans with a user-defined combine function over bfloat16 (cast to float32 first).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_FLOATS = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def bf16_bits_to_float(bits: np.ndarray) -> np.ndarray:
    """uint16 words holding bfloat16 -> float32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def float_to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 words holding bfloat16, rounded to nearest even; NaN stays NaN."""
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    words = flat.view(np.uint32)
    odd = (words >> 16) & 1
    rounded = ((words + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(flat), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    return _Handle(bf16_bits_to_float(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: Any) -> Any:
    return _Handle(float_to_bf16_bits(handle.data), tl.bfloat16)


def _wrap_reduction(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a reduction or scan over a bfloat16 tensor in float32 and round its floating results."""

    def wrapped(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = value[0] if isinstance(value, tuple) else value
        if tensor.dtype.scalar != tl.bfloat16:
            return method(self, value, *args, **kwargs)

        def narrow(item: Any) -> Any:
            if item.dtype.scalar != tl.float32:
                return item
            return self.to_tensor(float_to_bf16_bits(item.handle.data), tl.bfloat16)

        wide = self.to_tensor(bf16_bits_to_float(tensor.handle.data), tl.float32)
        result = method(self, wide, *args, **kwargs)
        if isinstance(result, (tuple, list)):
            return type(result)(narrow(item) for item in result)
        return narrow(result)

    return wrapped


def _install_casts(builder: type) -> None:
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        target = target.scalar
        wide = _widen(source)
        if target == tl.bfloat16:
            return _Handle(float_to_bf16_bits(wide.data.astype(np.float32)), tl.bfloat16)
        if wide is not source and target == tl.float32:
            return wide
        return plain_cast(self, wide, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        scalars = (source.dtype.scalar, target.scalar)
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and tl.bfloat16 in scalars and all(scalar in _FLOATS for scalar in scalars):
            return cast_impl(self, source, target)
        return plain_fp_to_fp(self, _widen(source), target, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _install_arithmetic(builder: type) -> None:
    plain_binary, plain_unary, plain_ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    plain_fma = builder.create_fma

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if op in _BITWISE or not (_is_bf16(left) and _is_bf16(right)):
            return plain_binary(self, left, right, op)
        result = plain_binary(self, _widen(left), _widen(right), op)
        return result if result.data.dtype == np.bool_ else _narrow(result)

    def unary_op(self: Any, operand: Any, op: Any) -> Any:
        return _narrow(plain_unary(self, _widen(operand), op)) if _is_bf16(operand) else plain_unary(self, operand, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is np.where or not _is_bf16(c):
            return plain_ternary(self, a, b, c, op)
        return _narrow(plain_ternary(self, _widen(a), _widen(b), _widen(c), op))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        result = plain_fma(self, _widen(x), _widen(y), _widen(z))
        return _narrow(result) if _is_bf16(z) else result

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma = create_fma


def _install_dot(builder: type) -> None:
    plain_dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, max_imprecise: Any) -> Any:
        left, right, total = _widen(a), _widen(b), _widen(acc)
        if any(handle.dtype.scalar not in _FLOATS for handle in (left, right, total)):
            return plain_dot(self, left, right, total, precision, max_imprecise)
        result = _Handle(_sequential_dot(left.data, right.data, total.data), total.dtype.scalar)
        return _narrow(result) if _is_bf16(acc) else result

    builder.create_dot = create_dot


def _sequential_dot(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total (..., M, N) + left (..., M, K) @ right (..., K, N), one K after another."""
    result = total.copy()
    left, right = left.astype(total.dtype), right.astype(total.dtype)
    product = np.empty_like(result)
    for k in range(left.shape[-1]):
        np.multiply(left[..., :, k : k + 1], right[..., k : k + 1, :], out=product)
        result += product
    return result


def _install_constants(builder: type) -> None:
    def get_bf16(self: Any, value: float) -> Any:
        return _Handle(float_to_bf16_bits(np.array([value], dtype=np.float32)), tl.bfloat16)

    builder.get_bf16 = get_bf16


def install() -> None:
    """Patch the interpreter in place; calling it again changes nothing."""
    builder, reduce_ops, scan_ops = interpreter.InterpreterBuilder, interpreter.ReduceOps, interpreter.ScanOps
    if getattr(builder, "_bf16_is_correct", False):
        return
    builder._bf16_is_correct = True
    _install_casts(builder)
    _install_arithmetic(builder)
    _install_dot(builder)
    _install_constants(builder)
    reduce_ops.sum, reduce_ops.min_max = _wrap_reduction(reduce_ops.sum), _wrap_reduction(reduce_ops.min_max)
    scan_ops.cumsum, scan_ops.cumprod = _wrap_reduction(scan_ops.cumsum), _wrap_reduction(scan_ops.cumprod)
