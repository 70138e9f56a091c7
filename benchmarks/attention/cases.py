"""Inputs and stock peers shared by the attention benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from vexact.ops.kernels.attention import packed_forward, paged_forward
from vexact.ops.kernels.attention.launch import KeyBlocks, Tile


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, key/value heads, head dimension and value head dimension."""

    queries: int
    keys: int
    dim: int
    value_dim: int


QWEN3 = Heads(16, 8, 128, 128)
MOONLIGHT = Heads(16, 16, 192, 128)  # latent attention, expanded


@dataclass(slots=True)
class Packed:
    """Sequences end to end: q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, Dv), cu (B + 1,) int32."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu: Tensor
    lengths: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def run(
        self,
        tile: Tile | None = None,
        causal: bool = True,
        blocks: KeyBlocks | None = None,
        specialised: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        longest = max(self.lengths)
        return packed_forward(
            self.q, self.k, self.v, self.cu, self.cu, longest, longest, self.scale, causal,
            tile=tile, key_blocks=blocks, specialised=specialised,
        )  # fmt: skip


@dataclass(slots=True)
class Paged:
    """New tokens q (T, Hq, D) over caches (pages, page_size, Hkv, D); row b of the table is padded by -1."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_q: Tensor
    seqused: Tensor
    table: Tensor
    max_q: int
    max_k: int

    def run(self, causal: bool = True, **options: object) -> tuple[Tensor, Tensor]:
        return paged_forward(
            self.q, self.k_cache, self.v_cache, self.cu_q, self.seqused, self.table, self.max_q, self.max_k,
            self.q.shape[-1] ** -0.5, causal, **options,
        )  # fmt: skip


def cumulative(lengths: list[int], device: str = "cuda") -> Tensor:
    """[0, l0, l0 + l1, ...] as int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def packed_case(lengths: list[int], heads: Heads, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """Normal numbers in sequences of these lengths."""
    total = sum(lengths)
    q = torch.randn(total, heads.queries, heads.dim, device="cuda", dtype=dtype)
    k = torch.randn(total, heads.keys, heads.dim, device="cuda", dtype=dtype)
    v = torch.randn(total, heads.keys, heads.value_dim, device="cuda", dtype=dtype)
    return Packed(q, k, v, cumulative(lengths), lengths)


def page_tables(lengths: list[int], page_size: int) -> tuple[Tensor, int]:
    """(table (B, P) int32 of shuffled pages padded by -1, number of pages), one spare column."""
    counts = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(max(1, sum(counts)), dtype=torch.int32).split([*counts, max(1, sum(counts)) - sum(counts)])
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    for row, own in zip(table, pages[: len(lengths)], strict=True):
        row[: len(own)] = own
    return table.cuda(), max(1, sum(counts))


def to_pages(case: Packed, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(k_cache, v_cache, table) with the keys of a packed case; slots that hold no key are NaN."""
    table, num_pages = page_tables(case.lengths, page_size)
    caches = []
    for rows in (case.k, case.v):
        cache = torch.full((num_pages * page_size, *rows.shape[1:]), float("nan"), device="cuda", dtype=rows.dtype)
        start = 0
        for own, length in zip(table, case.lengths, strict=True):
            position = torch.arange(length, device="cuda")
            cache[own[position // page_size].long() * page_size + position % page_size] = rows[start : start + length]
            start += length
        caches.append(cache.view(num_pages, page_size, *rows.shape[1:]))
    return caches[0], caches[1], table


def decode_case(batch: int, keys: int, heads: Heads, page_size: int, dtype: torch.dtype = torch.bfloat16) -> Paged:
    """One new token for each of ``batch`` sequences of ``keys`` keys in random pages."""
    table, num_pages = page_tables([keys] * batch, page_size)
    q = torch.randn(batch, heads.queries, heads.dim, device="cuda", dtype=dtype)
    k = torch.randn(num_pages, page_size, heads.keys, heads.dim, device="cuda", dtype=dtype)
    v = torch.randn(num_pages, page_size, heads.keys, heads.value_dim, device="cuda", dtype=dtype)
    used = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
    return Paged(q, k, v, cumulative([1] * batch), used, table, 1, keys)


def decode_bytes(case: Paged) -> int:
    """Bytes a decode step must move: every key and value once, the queries in, the rows out."""
    row = (case.k_cache.shape[-1] + case.v_cache.shape[-1]) * case.k_cache.shape[-2]
    io = case.q.numel() * (1 + case.v_cache.shape[-1] / case.q.shape[-1])
    return int((int(case.seqused.sum()) * row + io) * case.q.element_size())


def forward_flops(lengths: list[int], heads: Heads, causal: bool = True) -> float:
    """Multiplications and additions of QK^T and PV; half of them under a causal mask."""
    return sum(2.0 * n * n * heads.queries * (heads.dim + heads.value_dim) for n in lengths) * (0.5 if causal else 1.0)


def backward_flops(lengths: list[int], heads: Heads, causal: bool = True) -> float:
    """The scores again, dQ and dK, as wide as keys; dV and the gradient of the weights, as wide as values."""
    widths = 3 * heads.dim + 2 * heads.value_dim
    return forward_flops(lengths, heads, causal) * widths / (heads.dim + heads.value_dim)


def stock_forward(case: Packed, backend: SDPBackend) -> Callable[[], Tensor]:
    """The same attention of equally long sequences by a stock kernel; its (B, H, L, D) inputs are prepared before."""
    q, k, v = _stock_inputs(case, backend)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def stock_backward(case: Packed, dout: Tensor, backend: SDPBackend) -> Callable[[], object]:
    """The stock backward alone: the forward runs once, outside the clock."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in _stock_inputs(case, backend))
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grad = pad(_batched(dout, case.lengths), (0, out.shape[-1] - dout.shape[-1]))
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def _stock_inputs(case: Packed, backend: SDPBackend) -> list[Tensor]:
    """FlashAttention-2 knows one width: narrower values are padded for it with zeros, as engines do."""
    inputs = [_batched(tensor, case.lengths) for tensor in (case.q, case.k, case.v)]
    if backend == SDPBackend.FLASH_ATTENTION:
        inputs[2] = pad(inputs[2], (0, case.q.shape[-1] - case.v.shape[-1]))
    return inputs


def _batched(rows: Tensor, lengths: list[int]) -> Tensor:
    return rows.view(len(lengths), lengths[0], *rows.shape[1:]).transpose(1, 2)
