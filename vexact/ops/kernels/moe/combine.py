"""A token's expert rows into one: fp32 multiply-adds in the order of the experts, spelled out; one rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from vexact.ops.kernels.chain import overlapping
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import overlaps
from vexact.ops.kernels.sizes import cdiv, column_blocks, next_power_of_2

_forward, _backward = Launches(), Launches()


@triton.jit
def combine_kernel(
    y_ptr,  # (P, H)
    weights_ptr,  # (T, TOP_K) fp32, read only if WEIGHTED
    slots_ptr,  # (T, TOP_K) int32
    shared_ptr,  # (T, H), read only if HAS_SHARED
    out_ptr,  # (T, H)
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # launched while the kernel before it ends
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + j).to(tl.int64)
        taken = slot >= 0
        y = tl.load(y_ptr + slot * H + columns, mask=mask & taken, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * TOP_K + j)
            total = tl.fma(tl.broadcast_to(weight, (BLOCK,)), y, acc)
        else:
            total = acc + y
        acc = tl.where(taken, total, acc)
    if HAS_SHARED:
        acc += tl.load(shared_ptr + token * H + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine_backward_kernel(
    dout_ptr,  # (T, H)
    y_ptr,  # (P, H)
    weights_ptr,  # (T, TOP_K) fp32
    slots_ptr,  # (T, TOP_K) int32
    dy_ptr,  # (P, H)
    dweights_ptr,  # (T, TOP_K) fp32
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair; a whole row in one tile, whose shape and warps depend on H alone, as does the order of its sum."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + pair).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = (columns < H) & (slot >= 0)
    dout = tl.load(dout_ptr + pair // TOP_K * H + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + slot * H + columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(weights_ptr + pair) * dout
    tl.store(dy_ptr + slot * H + columns, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(dweights_ptr + pair, tl.sum(dout * y, 0))


def forward(y: Tensor, weights: Tensor, slots: Tensor, shared: Tensor | None) -> Tensor:
    """y (P, H), weights (T, k) fp32, slots (T, k), shared (T, H) or None, all contiguous -> (T, H)."""
    return _launch(y, weights, slots, shared)


def total(dx: Tensor, slots: Tensor) -> Tensor:
    """dx (P, K) contiguous -> (T, K): a token's places added in order."""
    return _launch(dx, None, slots, None)


def backward(dout: Tensor, y: Tensor, weights: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """dout (T, H) -> dy (P, H) in the dtype of ``y``, dweights (T, k) fp32; every tensor contiguous."""
    width, dy, dweights = y.shape[1], torch.empty_like(y), torch.empty_like(weights)
    tensors = dout, y, weights, slots, dy, dweights
    _backward((slots.shape, width, dout.dtype, y.dtype), tensors, lambda: _backward_call(tensors, width))
    return dy, dweights


def _backward_call(tensors: tuple[Tensor, ...], width: int) -> Call:
    slots, block = tensors[3], next_power_of_2(width)
    constants = {"H": width, "TOP_K": slots.shape[1], "BLOCK": block}
    options = {"num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": False}
    return Call(combine_backward_kernel, (slots.numel(),), tensors, constants | options)


def _launch(y: Tensor, weights: Tensor | None, slots: Tensor, shared: Tensor | None) -> Tensor:
    out = y.new_empty(slots.shape[0], y.shape[1])
    kinds = y.dtype, weights is not None, None if shared is None else shared.dtype
    given = [tensor for tensor in (y, weights, slots, shared, out) if tensor is not None]
    _forward((slots.shape, y.shape[1], *kinds), given, lambda: _forward_call(y, weights, slots, shared, out))
    return out


def _forward_call(y: Tensor, weights: Tensor | None, slots: Tensor, shared: Tensor | None, out: Tensor) -> Call:
    (num_tokens, top_k), width, overlap = slots.shape, y.shape[1], overlaps(y.device)
    config = column_blocks(width, widest=1024)
    constants = {
        **{"H": width, "TOP_K": top_k, "WEIGHTED": weights is not None, "HAS_SHARED": shared is not None},
        **{**config, "OVERLAP": overlap, "enable_fp_fusion": False, **overlapping(overlap)},
    }
    args = y, y if weights is None else weights, slots, y if shared is None else shared, out
    return Call(combine_kernel, (num_tokens, cdiv(width, config["BLOCK"])), args, constants)
