"""Norm (or none), rotary embedding and the write of keys and values into pages, in one launch: what decoding does.

The arithmetic of `rope` and `qk_norm_rope`, whose bits it has: the same tiles, the same order of operations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels import chain
from vexact.ops.kernels.chain import follow
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import overlaps
from vexact.ops.kernels.rotary.qk_norm_rope import normalize, readable
from vexact.ops.kernels.rotary.rope import (
    head_tile,
    launch_config,
    load_halves,
    packed_heads,
    store_rotated,
    token_angles,
)
from vexact.ops.kernels.sizes import next_power_of_2

_launches = Launches()


@triton.jit(do_not_specialize=["num_positions"])
def _rope_to_cache_kernel(
    q_ptr,  # (T, HQ, 2 * HALF), token stride q_stride
    k_ptr,  # (T, HKV, 2 * HALF), token stride k_stride
    v_ptr,  # (T, HKV, DV), token stride v_stride
    q_weight_ptr,  # (2 * HALF,), read only if NORM
    k_weight_ptr,  # (2 * HALF,), likewise
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (P, 2 * HALF) fp32
    slots_ptr,  # (T,); negative: the token's key and value are written nowhere
    q_out_ptr,  # (T, HQ, 2 * HALF) contiguous
    k_cache_ptr,  # (pages, PAGE_SIZE, HKV, 2 * HALF), heads adjacent
    v_cache_ptr,  # (pages, PAGE_SIZE, HKV, DV), heads adjacent
    q_stride,
    k_stride,
    v_stride,
    k_page_stride,
    k_slot_stride,
    v_page_stride,
    v_slot_stride,
    num_positions,
    eps,
    PAGE_SIZE: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    DV: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    q_tile, q_mask = head_tile(HQ, HALF, BLOCK_HQ, BLOCK_HALF)
    k_tile, k_mask = head_tile(HKV, HALF, BLOCK_HKV, BLOCK_HALF)
    q_first, q_second = load_halves(q_ptr + token * q_stride + q_tile, q_mask, HALF)
    k_first, k_second = load_halves(k_ptr + token * k_stride + k_tile, k_mask, HALF)
    heads, columns = tl.arange(0, BLOCK_HKV)[:, None], tl.arange(0, BLOCK_DV)[None, :]
    v_tile, v_mask = heads * DV + columns, (heads < HKV) & (columns < DV)
    v = tl.load(v_ptr + token * v_stride + v_tile, mask=v_mask, other=0.0)
    lanes = tl.arange(0, BLOCK_HALF)
    if NORM:
        q_first_weight, q_second_weight = load_halves(q_weight_ptr + lanes, lanes < HALF, HALF)
        k_first_weight, k_second_weight = load_halves(k_weight_ptr + lanes, lanes < HALF, HALF)
    cos, sin = token_angles(cos_sin_ptr, position, num_positions, HALF, BLOCK_HALF)

    if NORM:
        q_first, q_second, _ = normalize(q_first, q_second, q_first_weight, q_second_weight, eps, HALF)
        k_first, k_second, _ = normalize(k_first, k_second, k_first_weight, k_second_weight, eps, HALF)
    store_rotated(q_out_ptr + token * (HQ * 2 * HALF) + q_tile, q_first, q_second, cos, sin, q_mask, HALF)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    k_row = k_cache_ptr + page * k_page_stride + offset * k_slot_stride
    store_rotated(k_row + k_tile, k_first, k_second, cos, sin, k_mask & (slot >= 0), HALF)
    v_row = v_cache_ptr + page * v_page_stride + offset * v_slot_stride
    tl.store(v_row + v_tile, v, mask=v_mask & (slot >= 0))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotates every head, after its norm where there are weights; returns contiguous q' and writes k' and v to slots.

    Args:
        q: (T, Hq, D). k: (T, Hkv, D). v: (T, Hkv, Dv); views of a fused projection are read in place.
        q_weight, k_weight: (D,) or None, both.
        positions: (T,) integer. cos_sin: (P, D) fp32, cosines first.
        k_cache: (pages, page_size, Hkv, D). v_cache: (pages, page_size, Hkv, Dv); the heads of a token are adjacent.
        slot_mapping: (T,) int64, page * page_size + offset; a negative slot is skipped.
    """
    (num_tokens, num_q_heads, head_dim), (num_kv_heads, value_dim) = q.shape, v.shape[1:]
    q, k, v = readable(q), readable(k), packed_heads(v)
    out = q.new_empty(q.shape)
    if num_tokens == 0:
        return out
    shared = positions.contiguous(), cos_sin.contiguous(), slot_mapping.contiguous(), out, k_cache, v_cache
    weights = () if q_weight is None or k_weight is None else (q_weight.contiguous(), k_weight.contiguous())
    strides = q.stride(0), k.stride(0), v.stride(0), *k_cache.stride()[:2], *v_cache.stride()[:2]
    page_size, num_positions = k_cache.shape[1], cos_sin.shape[0]

    def call() -> Call:
        args = q, k, v, *(weights or (q, k)), *shared, *strides, num_positions, eps
        constants = {
            **{"PAGE_SIZE": page_size, "HQ": num_q_heads, "HKV": num_kv_heads, "HALF": head_dim // 2},
            **{"DV": value_dim, "NORM": bool(weights), "BLOCK_DV": next_power_of_2(value_dim)},
            **launch_config(num_q_heads, num_kv_heads, head_dim),
            **{"enable_fp_fusion": False, **chain.options(num_tokens, overlaps(q.device), may_be_early=True)},
        }
        return Call(_rope_to_cache_kernel, (num_tokens,), args, constants)

    sizes = num_tokens, num_q_heads, num_kv_heads, head_dim, value_dim, page_size, num_positions
    key = sizes, strides, q.dtype, positions.dtype, slot_mapping.dtype, eps, len(weights)
    _launches(key, (q, k, v, *weights, *shared), call)
    return out
