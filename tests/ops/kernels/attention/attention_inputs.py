"""Inputs of the attention kernel tests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from rowwise import DEVICE
from torch import Tensor

from vexact.ops.kernels.attention import paged_forward
from vexact.ops.kernels.attention.launch import KeyBlocks, Tile

# Small key blocks make short sequences cross many of them, and several chunks.
SMALL = KeyBlocks(16, 32)


@dataclass(slots=True)
class Batch:
    """Sequences end to end: q (T, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_lens: list[int]
    k_lens: list[int]

    @property
    def cu_q(self) -> Tensor:
        return cumulative(self.q_lens)

    @property
    def cu_k(self) -> Tensor:
        return cumulative(self.k_lens)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float]:
        """Those of packed_forward, without `causal`."""
        return (self.q, self.k, self.v, self.cu_q, self.cu_k, max(self.q_lens), max(self.k_lens), self.scale)

    def sequence(self, index: int) -> Batch:
        """One sequence alone."""
        (q0, q1), (k0, k1) = (list(pairwise(cu.tolist()))[index] for cu in (self.cu_q, self.cu_k))
        return Batch(self.q[q0:q1], self.k[k0:k1], self.v[k0:k1], [q1 - q0], [k1 - k0])


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)


def make_batch(
    q_lens: list[int],
    k_lens: list[int],
    *,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    q = draw(sum(q_lens), heads[0], dims[0])
    return Batch(q, draw(sum(k_lens), heads[1], dims[0]), draw(sum(k_lens), heads[1], dims[1]), q_lens, k_lens)


@dataclass(slots=True)
class Pages:
    """The keys of a batch in shuffled pages. Slots without a key and the page before the first one are NaN."""

    k_cache: Tensor
    v_cache: Tensor
    table: Tensor

    def run(
        self,
        batch: Batch,
        causal: bool = True,
        *,
        split_rows: int | None = None,
        tile: Tile | None = None,
        decode_tile: Tile | None = None,
        blocks: KeyBlocks = SMALL,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the batch's queries over the pages; its key lengths say how many keys are used."""
        used = torch.tensor(batch.k_lens, dtype=torch.int32, device=DEVICE)
        return paged_forward(
            batch.q, self.k_cache, self.v_cache, batch.cu_q, used, self.table, max(batch.q_lens), max(batch.k_lens),
            batch.scale, causal, split_rows=split_rows, tile=tile, decode_tile=decode_tile, key_blocks=blocks,
        )  # fmt: skip


def make_pages(batch: Batch, page_size: int, seed: int = 0) -> Pages:
    """Pages of a batch; rows of the table are padded by -1, which, dereferenced, would read the NaN page."""
    counts = [-(-length // page_size) for length in batch.k_lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(counts), max(counts) + 2), -1, dtype=torch.int32)
    caches = [
        torch.full((sum(counts) + 1, page_size, *rows.shape[1:]), float("nan"), dtype=rows.dtype, device=DEVICE)
        for rows in (batch.k, batch.v)
    ]
    starts = batch.cu_k.tolist()
    for index, count in enumerate(counts):
        for slot in range(count):
            page = order.pop()
            table[index, slot] = page
            first = starts[index] + slot * page_size
            last = min(first + page_size, starts[index + 1])
            for cache, rows in zip(caches, (batch.k, batch.v), strict=True):
                cache[1 + page, : last - first] = rows[first:last]
    return Pages(caches[0][1:], caches[1][1:], table.to(DEVICE))


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Equal in every bit, NaN included."""
    words = {2: torch.int16, 4: torch.int32}
    return all(torch.equal(x.view(words[x.itemsize]), y.view(words[y.itemsize])) for x, y in zip(a, b, strict=True))


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
