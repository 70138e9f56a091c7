"""Gradient of log-prob and entropy by the logits, elementwise: as a GEMM epilogue and as a kernel of its own.

With z = logit / T, p = softmax over the kept set and H its entropy:
d logprob / d z_j = [j = target] - p_j  and  d H / d z_j = -p_j (log p_j + H).
Both kernels call one function and round every product where it is written, so they give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vexact.ops.kernels.linear.pointer import tile_coordinates
from vexact.ops.kernels.linear.tma import halves, multiply_tile


@triton.jit
def logit_gradient(
    logit, is_target, inv_temperature, min_logit, lse, entropy, dlogprob, dentropy, HAS_DENTROPY: tl.constexpr
):
    """fp32 gradient by the raw logit. All arguments broadcast against ``logit``."""
    log_p = logit * inv_temperature - lse
    p = tl.where((logit < min_logit) & ~is_target, 0.0, tl.exp(log_p))
    grad = tl.where(is_target, dlogprob, 0.0) - dlogprob * p
    if HAS_DENTROPY:
        grad -= dentropy * tl.where(p > 0.0, p * (log_p + entropy), 0.0)
    return grad * inv_temperature


@triton.jit
def row_logit_gradient(
    logit,  # (rows, columns)
    rows,
    columns,
    in_rows,
    target_ptr,
    inv_temperature_ptr,
    min_logit_ptr,
    lse_ptr,
    entropy_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    HAS_DENTROPY: tl.constexpr,
):
    """``logit_gradient`` of a tile, whose per-row values are loaded here. ``columns`` are vocabulary indices."""
    target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
    inv_temperature = tl.load(inv_temperature_ptr + rows, mask=in_rows, other=0.0)[:, None]
    min_logit = tl.load(min_logit_ptr + rows, mask=in_rows, other=0.0)[:, None]
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=0.0)[:, None]
    dlogprob = tl.load(dlogprob_ptr + rows, mask=in_rows, other=0.0)[:, None]
    is_target = columns[None, :] == target[:, None]
    if HAS_DENTROPY:
        entropy = tl.load(entropy_ptr + rows, mask=in_rows, other=0.0)[:, None]
        dentropy = tl.load(dentropy_ptr + rows, mask=in_rows, other=0.0)[:, None]
    else:
        entropy = 0.0
        dentropy = 0.0
    return logit_gradient(logit, is_target, inv_temperature, min_logit, lse, entropy, dlogprob, dentropy, HAS_DENTROPY)


@triton.jit(do_not_specialize=["M", "N", "K", "first_column"])
def matmul_dlogits_kernel(
    a_desc,  # hidden (M, K)
    b_desc,  # rows of the weight: (N, K)
    d_desc,  # dlogits (M, N), blocks of BLOCK_M x BLOCK_N / 4
    target_ptr,
    inv_temperature_ptr,
    min_logit_ptr,
    lse_ptr,
    entropy_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    M,
    N,
    K,
    first_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
):
    """Recompute the logits of the vocabulary slice that starts at ``first_column`` and store their gradients.

    The product is the one of ``matmul_tma_kernel``; the fp32 logits never leave the registers.
    """
    WIDTH: tl.constexpr = BLOCK_N // 4
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    stored = tl.program_id(0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_coordinates(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = multiply_tile(a_desc, b_desc, acc, tile_m * BLOCK_M, tile_n * BLOCK_N, K, BLOCK_K, True, True, False)
        tile_m, tile_n = tile_coordinates(stored, tiles_m, tiles_n, GROUP_M)
        stored += tl.num_programs(0)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        left, right = halves(acc)
        for side in tl.static_range(2):
            first, second = halves(left if side == 0 else right)
            for strip in tl.static_range(2):
                column = tile_n * BLOCK_N + (2 * side + strip) * WIDTH
                grad = row_logit_gradient(
                    first if strip == 0 else second,
                    rows,
                    first_column + column + tl.arange(0, WIDTH),
                    rows < M,
                    target_ptr,
                    inv_temperature_ptr,
                    min_logit_ptr,
                    lse_ptr,
                    entropy_ptr,
                    dlogprob_ptr,
                    dentropy_ptr,
                    HAS_DENTROPY,
                )
                d_desc.store([tile_m * BLOCK_M, column], grad.to(d_desc.dtype))


@triton.jit(do_not_specialize=["first_column"])
def dlogits_kernel(
    logits_ptr,  # (M, N) fp32
    dlogits_ptr,  # (M, N)
    target_ptr,
    inv_temperature_ptr,
    min_logit_ptr,
    lse_ptr,
    entropy_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    N,
    logits_stride,
    dlogits_stride,
    first_column,
    BLOCK: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
):
    """Gradients of stored logits; one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits_ptr + row * logits_stride + columns, mask=columns < N, other=0.0)
    grad = row_logit_gradient(
        logit[None, :],
        row + tl.arange(0, 1),
        first_column + columns,
        tl.full((1,), True, tl.int1),
        target_ptr,
        inv_temperature_ptr,
        min_logit_ptr,
        lse_ptr,
        entropy_ptr,
        dlogprob_ptr,
        dentropy_ptr,
        HAS_DENTROPY,
    )
    grad = tl.reshape(grad, (BLOCK,)).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row * dlogits_stride + columns, grad, mask=columns < N)
