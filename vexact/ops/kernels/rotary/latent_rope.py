"""Rotation and assembly of the heads of multi-head latent attention in Triton: one launch for queries and keys.

The arithmetic is that of ``rope``; everything else is copied, so no tile shape or batch can change a bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.rotary.rope import store_rotated, token_angles
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

BLOCK_HEADS = 8
_launches = Launches()


@triton.jit(do_not_specialize=["num_positions"])
def _latent_rope_kernel(
    q_ptr,  # (T, HEADS, PLAIN + 2 * HALF), strides q_stride and q_head_stride
    k_plain_ptr,  # (T, HEADS, PLAIN), strides k_stride and k_head_stride
    k_rotated_ptr,  # (T, 2 * HALF), token stride rotated_stride
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (P, 2 * HALF) fp32
    q_out_ptr,  # (T, HEADS, PLAIN + 2 * HALF) contiguous
    k_out_ptr,  # the same
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    rotated_stride,
    num_positions,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PLAIN: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """BLOCK_HEADS heads of a token; all loads before the first store."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_PLAIN)[None, :]
    lanes = tl.arange(0, BLOCK_HALF)[None, :]
    plain, rotated = (heads < HEADS) & (columns < PLAIN), (heads < HEADS) & (lanes < HALF)
    first, second = lanes, lanes + HALF
    if INTERLEAVED:
        first, second = 2 * lanes, 2 * lanes + 1
    position = tl.load(positions_ptr + token).to(tl.int64)
    q_at = q_ptr + token * q_stride + heads * q_head_stride
    q_plain = tl.load(q_at + columns, mask=plain)
    k_plain = tl.load(k_plain_ptr + token * k_stride + heads * k_head_stride + columns, mask=plain)
    q_first = tl.load(q_at + PLAIN + first, mask=rotated, other=0.0)
    q_second = tl.load(q_at + PLAIN + second, mask=rotated, other=0.0)
    k_at = k_rotated_ptr + token * rotated_stride
    k_first = tl.load(k_at + first, mask=lanes < HALF, other=0.0)
    k_second = tl.load(k_at + second, mask=lanes < HALF, other=0.0)
    cos, sin = token_angles(cos_sin_ptr, position, num_positions, HALF, BLOCK_HALF)

    out = (token * HEADS + heads) * (PLAIN + 2 * HALF)
    tl.store(q_out_ptr + out + columns, q_plain, mask=plain)
    tl.store(k_out_ptr + out + columns, k_plain, mask=plain)
    store_rotated(q_out_ptr + out + PLAIN + lanes, q_first, q_second, cos, sin, rotated, HALF)
    k_first, k_second = tl.broadcast_to(k_first, q_first.shape), tl.broadcast_to(k_second, q_first.shape)
    store_rotated(k_out_ptr + out + PLAIN + lanes, k_first, k_second, cos, sin, rotated, HALF)


def launch_config(plain: int, rotated: int) -> dict[str, int]:
    """Tile of one token and its warp count."""
    return {
        "BLOCK_HEADS": BLOCK_HEADS,
        "BLOCK_PLAIN": next_power_of_2(plain),
        "BLOCK_HALF": next_power_of_2(rotated // 2),
        "num_warps": 4,
    }


def forward(
    q: Tensor, k_plain: Tensor, k_rotated: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Views of the projections are read in place, as long as a head's numbers are neighbours.

    Args:
        q: (T, H, N + R), the last R numbers of a head rotated. k_plain: (T, H, N). k_rotated: (T, R).
        positions: (T,) integer. cos_sin: (P, R) fp32, cosines first.

    Returns:
        Contiguous queries and keys (T, H, N + R).
    """
    q, k_plain, k_rotated = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_plain, k_rotated))
    num_tokens, num_heads, width = q.shape
    rotated = k_rotated.shape[1]
    outputs = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2)]
    tensors = q, k_plain, k_rotated, positions.contiguous(), cos_sin.contiguous(), *outputs
    sizes = *q.stride()[:2], *k_plain.stride()[:2], k_rotated.stride(0), cos_sin.shape[0]

    def call() -> Call:
        constants = {
            **{"HEADS": num_heads, "PLAIN": width - rotated, "HALF": rotated // 2, "INTERLEAVED": interleaved},
            **launch_config(width - rotated, rotated),
            "enable_fp_fusion": False,
        }
        grid = num_tokens, cdiv(num_heads, BLOCK_HEADS)
        return Call(_latent_rope_kernel, grid, (*tensors, *sizes), constants)

    _launches((*q.shape, rotated, sizes, q.dtype, positions.dtype, interleaved), tensors, call)
    return outputs[0], outputs[1]
