"""Per-head RMSNorm and rotary embedding of queries and keys in Triton, one launch for both.

One program per token. A head's bits depend on its row, its token's angle and the head counts and size alone: the tile
and the warp count are functions of these, inputs are aligned, and floating-point contraction is off, so that the
normalised row is rounded where `rms_norm` rounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.rope import launch_config, packed_heads, store_rotated, token_angles


@triton.jit
def _norm_and_rotate(
    in_ptr,  # (heads, 2 * HALF), one token
    weight_ptr,  # (2 * HALF,)
    out_ptr,  # (heads, 2 * HALF)
    rstd_ptr,  # (heads,) fp32
    cos,  # (BLOCK_HALF,) fp32
    sin,
    eps,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    heads = tl.arange(0, BLOCK_HEADS)
    lanes = tl.arange(0, BLOCK_HALF)
    mask = (heads < NUM_HEADS)[:, None] & (lanes < HALF)[None, :]
    offsets = heads[:, None] * (2 * HALF) + lanes[None, :]
    dtype = out_ptr.dtype.element_ty
    first = tl.load(in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(in_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)

    mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    rstd = tl.rsqrt(mean_square + eps)
    tl.store(rstd_ptr + heads, rstd, mask=heads < NUM_HEADS)
    first_weight = tl.load(weight_ptr + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)
    first = (first * rstd[:, None]).to(dtype).to(tl.float32) * first_weight[None, :]
    second = (second * rstd[:, None]).to(dtype).to(tl.float32) * second_weight[None, :]

    first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    store_rotated(out_ptr + offsets, first, second, cos, sin, mask, HALF)


@triton.jit(do_not_specialize=["num_positions"])
def _qk_norm_rope_kernel(
    q_ptr,  # (T, HQ, 2 * HALF), token stride q_stride
    k_ptr,  # (T, HKV, 2 * HALF), token stride k_stride
    q_weight_ptr,  # (2 * HALF,)
    k_weight_ptr,  # (2 * HALF,)
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (P, 2 * HALF) fp32
    q_out_ptr,  # (T, HQ, 2 * HALF) contiguous
    k_out_ptr,  # (T, HKV, 2 * HALF) contiguous
    q_rstd_ptr,  # (T, HQ) fp32
    k_rstd_ptr,  # (T, HKV) fp32
    q_stride,
    k_stride,
    num_positions,
    eps,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos, sin = token_angles(cos_sin_ptr, position, num_positions, HALF, BLOCK_HALF)
    _norm_and_rotate(
        q_ptr + token * q_stride, q_weight_ptr, q_out_ptr + token * (HQ * 2 * HALF), q_rstd_ptr + token * HQ,
        cos, sin, eps, HQ, HALF, BLOCK_HQ, BLOCK_HALF,
    )  # fmt: skip
    _norm_and_rotate(
        k_ptr + token * k_stride, k_weight_ptr, k_out_ptr + token * (HKV * 2 * HALF), k_rstd_ptr + token * HKV,
        cos, sin, eps, HKV, HALF, BLOCK_HKV, BLOCK_HALF,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalises every head, then rotates its two halves by the angle of its token.

    Args:
        q: (T, Hq, D) and k: (T, Hkv, D); views of a fused projection are read in place. q_weight, k_weight: (D,).
        positions: (T,) integer. cos_sin: (P, D) fp32, cosines first.

    Returns:
        Contiguous q' and k' of the input dtype, and the rstd of their heads, (T, Hq) and (T, Hkv) fp32.
    """
    (num_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    q, k = _readable(q), _readable(k)
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    rstds = [torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (q, k)]
    _qk_norm_rope_kernel[(num_tokens,)](
        q,
        k,
        q_weight,
        k_weight,
        positions.contiguous(),
        cos_sin.contiguous(),
        *outputs,
        *rstds,
        q.stride(0),
        k.stride(0),
        cos_sin.shape[0],
        eps,
        HQ=num_q_heads,
        HKV=num_kv_heads,
        HALF=head_dim // 2,
        **launch_config(num_q_heads, num_kv_heads, head_dim),
        enable_fp_fusion=False,
    )
    return outputs[0], outputs[1], rstds[0], rstds[1]


def _readable(x: Tensor) -> Tensor:
    """``x`` (T, heads, D) with one token's heads adjacent and aligned in memory; copies only if they are not.

    Triton compiles another layout, and so another order of additions, for rows that are not 16-byte aligned.
    """
    x = packed_heads(x)
    aligned = (x.stride(0) % 16 == 0 or x.is_contiguous()) and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
