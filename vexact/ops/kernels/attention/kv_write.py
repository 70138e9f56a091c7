"""Scatter of new keys and values into the pages of a cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.attention.launch import padded
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.sizes import cdiv

ROWS_PER_PROGRAM = 16
_launches = Launches()


@triton.jit(do_not_specialize=["num_rows"])
def write_kernel(
    k, v, k_cache, v_cache, slots, num_rows,
    stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kp, stride_ks, stride_kd, stride_vp, stride_vs, stride_vd,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS (token, head) rows of k (T, KV_HEADS, D) and v (T, KV_HEADS, DV) go to slot = page * PAGE_SIZE + offset."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // KV_HEADS
    head = row % KV_HEADS
    inside = token < num_rows
    slot = tl.load(slots + token, mask=inside, other=-1)
    used = (slot >= 0)[:, None]
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    offs_d = tl.arange(0, D_PAD)[None, :]
    mask = used & (offs_d < D)
    source = k + (token * stride_kt + head * stride_kh)[:, None] + offs_d
    target = k_cache + (page * stride_kp + offset * stride_ks + head * stride_kd)[:, None] + offs_d
    tl.store(target, tl.load(source, mask=mask), mask=mask)
    offs_dv = tl.arange(0, DV_PAD)[None, :]
    mask = used & (offs_dv < DV)
    source = v + (token * stride_vt + head * stride_vh)[:, None] + offs_dv
    target = v_cache + (page * stride_vp + offset * stride_vs + head * stride_vd)[:, None] + offs_dv
    tl.store(target, tl.load(source, mask=mask), mask=mask)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy row t of k and v to slot `slot_mapping[t]` of the caches; a negative slot is skipped.

    Args:
        k: (T, Hkv, D). v: (T, Hkv, Dv); read in place if the last dimension is contiguous.
        k_cache: (num_pages, page_size, Hkv, D). v_cache: (num_pages, page_size, Hkv, Dv); the last dimension is
            contiguous.
        slot_mapping: (T,) int64, page * page_size + offset; distinct where not negative.

    Raises:
        ValueError: dtype or head shape of the rows and the cache differ.
    """
    for name, rows, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if rows.dtype != cache.dtype or rows.shape[1:] != cache.shape[2:]:
            raise ValueError(
                f"write_kv: {name} is {rows.dtype} {tuple(rows.shape)}, its cache {cache.dtype} {tuple(cache.shape)}"
            )
    num_rows, num_heads, dim = k.shape
    if num_rows == 0:
        return
    k, v = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (k, v))
    tensors = k, v, k_cache, v_cache, slot_mapping.contiguous()
    strides = *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]
    page_size, value_dim = k_cache.shape[1], v.shape[2]
    _launches(
        (num_rows, num_heads, dim, value_dim, page_size, strides, k.dtype, slot_mapping.dtype),
        tensors,
        lambda: Call(
            write_kernel,
            (cdiv(num_rows * num_heads, ROWS_PER_PROGRAM),),
            (*tensors, num_rows, *strides),
            {
                **{"PAGE_SIZE": page_size, "KV_HEADS": num_heads, "D": dim, "DV": value_dim},
                **{"D_PAD": padded(dim), "DV_PAD": padded(value_dim), "ROWS": ROWS_PER_PROGRAM, "num_warps": 4},
            },
        ),
    )
