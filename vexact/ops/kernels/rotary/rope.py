"""Rotary position embedding in Triton: queries and keys in one launch, forward and inverse.

Elementwise: fp32 arithmetic without contraction, one rounding, so no tile shape or batch can change a bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.sizes import next_power_of_2

_rope = Launches()


@triton.jit
def token_angles(cos_sin_ptr, position, num_positions, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Cosines and sines (BLOCK_HALF,) of a token's position."""
    lanes = tl.arange(0, BLOCK_HALF)
    # A position outside the table gives NaN, which every later check sees, instead of another row's angle.
    readable = (lanes < HALF) & (position >= 0) & (position < num_positions)
    angles = cos_sin_ptr + position * (2 * HALF) + lanes
    cos = tl.load(angles, mask=readable, other=float("nan"))
    sin = tl.load(angles + HALF, mask=readable, other=float("nan"))
    return cos, sin


@triton.jit
def head_tile(NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Offsets (BLOCK_HEADS, BLOCK_HALF) of the first halves of a token's heads, and which of them exist."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    lanes = tl.arange(0, BLOCK_HALF)[None, :]
    return heads * (2 * HALF) + lanes, (heads < NUM_HEADS) & (lanes < HALF)


@triton.jit
def load_halves(pointers, mask, HALF: tl.constexpr):
    """Values at the pointers and HALF further, as stored.

    Kernels load all they need before they store: the compiler never moves a load above a store, so a later load would
    start only when everything stored before it had been computed.
    """
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + HALF, mask=mask, other=0.0)


@triton.jit
def store_rotated(pointers, first, second, cos, sin, mask, HALF: tl.constexpr):
    """Rotate the halves (BLOCK_HEADS, BLOCK_HALF) of a token's heads and store them, the second HALF further."""
    dtype = pointers.dtype.element_ty
    first, second = first.to(tl.float32), second.to(tl.float32)
    tl.store(pointers, (first * cos[None, :] - second * sin[None, :]).to(dtype), mask=mask)
    tl.store(pointers + HALF, (second * cos[None, :] + first * sin[None, :]).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_positions"])
def _rope_kernel(
    q_ptr,  # (T, HQ, 2 * HALF), token stride q_stride
    k_ptr,  # (T, HKV, 2 * HALF), token stride k_stride
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (P, 2 * HALF) fp32
    q_out_ptr,  # (T, HQ, 2 * HALF) contiguous
    k_out_ptr,  # (T, HKV, 2 * HALF) contiguous
    q_stride,
    k_stride,
    num_positions,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    q_tile, q_mask = head_tile(HQ, HALF, BLOCK_HQ, BLOCK_HALF)
    k_tile, k_mask = head_tile(HKV, HALF, BLOCK_HKV, BLOCK_HALF)
    q_first, q_second = load_halves(q_ptr + token * q_stride + q_tile, q_mask, HALF)
    k_first, k_second = load_halves(k_ptr + token * k_stride + k_tile, k_mask, HALF)
    cos, sin = token_angles(cos_sin_ptr, position, num_positions, HALF, BLOCK_HALF)
    if INVERSE:
        sin = -sin
    store_rotated(q_out_ptr + token * (HQ * 2 * HALF) + q_tile, q_first, q_second, cos, sin, q_mask, HALF)
    store_rotated(k_out_ptr + token * (HKV * 2 * HALF) + k_tile, k_first, k_second, cos, sin, k_mask, HALF)


def launch_config(num_q_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """Tile of one token and its warp count."""
    block_hq, block_half = next_power_of_2(num_q_heads), next_power_of_2(head_dim // 2)
    return {
        "BLOCK_HQ": block_hq,
        "BLOCK_HKV": next_power_of_2(num_kv_heads),
        "BLOCK_HALF": block_half,
        "num_warps": min(8, max(1, block_hq * block_half // 256)),
    }


def forward(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotates the two halves of every head by the angle of its token: ``(a, b) -> (a cos - b sin, b cos + a sin)``.

    Args:
        q: (T, Hq, D) and k: (T, Hkv, D); views of a fused projection are read in place, without a copy.
        positions: (T,) integer. cos_sin: (P, D) fp32, cosines first.
        inverse: rotate by the negative angle, which is also the gradient.

    Returns:
        Contiguous q' and k' of the input dtype.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q, k = packed_heads(q), packed_heads(k)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    tensors = q, k, positions.contiguous(), cos_sin.contiguous(), q_out, k_out
    sizes = q.stride(0), k.stride(0), cos_sin.shape[0]
    _rope(
        (*q.shape, num_kv_heads, *sizes, q.dtype, positions.dtype, inverse),
        tensors,
        lambda: Call(
            _rope_kernel,
            (num_tokens,),
            (*tensors, *sizes),
            {
                **{"HQ": num_q_heads, "HKV": num_kv_heads, "HALF": head_dim // 2, "INVERSE": inverse},
                **launch_config(num_q_heads, num_kv_heads, head_dim),
                "enable_fp_fusion": False,
            },
        ),
    )
    return q_out, k_out


def packed_heads(x: Tensor) -> Tensor:
    """``x`` (T, heads, D) with one token's heads adjacent in memory; copies only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
