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

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.rotary.rope import (
    head_tile,
    launch_config,
    load_halves,
    packed_heads,
    store_rotated,
    token_angles,
)

_launches = Launches()


@triton.jit
def normalize(first, second, first_weight, second_weight, eps, HALF: tl.constexpr):
    """Normalised halves (BLOCK_HEADS, BLOCK_HALF) of the input dtype, rounded before and after the weight, and rstd."""
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)
    first, second = (first * rstd[:, None]).to(dtype), (second * rstd[:, None]).to(dtype)
    first = first.to(tl.float32) * first_weight.to(tl.float32)[None, :]
    second = second.to(tl.float32) * second_weight.to(tl.float32)[None, :]
    return first.to(dtype), second.to(dtype), rstd


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
    q_tile, q_mask = head_tile(HQ, HALF, BLOCK_HQ, BLOCK_HALF)
    k_tile, k_mask = head_tile(HKV, HALF, BLOCK_HKV, BLOCK_HALF)
    q_first, q_second = load_halves(q_ptr + token * q_stride + q_tile, q_mask, HALF)
    k_first, k_second = load_halves(k_ptr + token * k_stride + k_tile, k_mask, HALF)
    lanes = tl.arange(0, BLOCK_HALF)
    q_first_weight, q_second_weight = load_halves(q_weight_ptr + lanes, lanes < HALF, HALF)
    k_first_weight, k_second_weight = load_halves(k_weight_ptr + lanes, lanes < HALF, HALF)
    cos, sin = token_angles(cos_sin_ptr, position, num_positions, HALF, BLOCK_HALF)

    q_first, q_second, q_rstd = normalize(q_first, q_second, q_first_weight, q_second_weight, eps, HALF)
    store_rotated(q_out_ptr + token * (HQ * 2 * HALF) + q_tile, q_first, q_second, cos, sin, q_mask, HALF)
    k_first, k_second, k_rstd = normalize(k_first, k_second, k_first_weight, k_second_weight, eps, HALF)
    store_rotated(k_out_ptr + token * (HKV * 2 * HALF) + k_tile, k_first, k_second, cos, sin, k_mask, HALF)

    # Last, because their layout goes through shared memory: nothing waits for these barriers.
    q_heads, k_heads = tl.arange(0, BLOCK_HQ), tl.arange(0, BLOCK_HKV)
    tl.store(q_rstd_ptr + token * HQ + q_heads, q_rstd, mask=q_heads < HQ)
    tl.store(k_rstd_ptr + token * HKV + k_heads, k_rstd, mask=k_heads < HKV)


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
    q, k, q_weight, k_weight = readable(q), readable(k), q_weight.contiguous(), k_weight.contiguous()
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    rstds = [torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (q, k)]
    tensors = q, k, q_weight, k_weight, positions.contiguous(), cos_sin.contiguous(), *outputs, *rstds
    sizes = q.stride(0), k.stride(0), cos_sin.shape[0]
    _launches(
        (*q.shape, num_kv_heads, *sizes, q.dtype, positions.dtype, eps),
        tensors,
        lambda: Call(
            _qk_norm_rope_kernel,
            (num_tokens,),
            (*tensors, *sizes, eps),
            {
                **{"HQ": num_q_heads, "HKV": num_kv_heads, "HALF": head_dim // 2},
                **launch_config(num_q_heads, num_kv_heads, head_dim),
                "enable_fp_fusion": False,
            },
        ),
    )
    return outputs[0], outputs[1], rstds[0], rstds[1]


def readable(x: Tensor) -> Tensor:
    """``x`` (T, heads, D) with one token's heads adjacent and aligned in memory; copies only if they are not.

    Triton compiles another layout, and so another order of additions, for addresses and strides that 16 does not
    divide. So rows lie as in a tensor of their own wherever 16 does not divide the width of these.
    """
    x = packed_heads(x)
    stride, width = x.stride(0), x.shape[1] * x.shape[2]
    alike = stride == width or stride % 16 == 0 == width % 16
    return x if alike and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
