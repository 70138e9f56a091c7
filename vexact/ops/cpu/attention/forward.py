"""CPU twin of attention: query tiles of a size fixed by the head counts walk key blocks at fixed absolute positions.

Packed and paged attention differ only in where a key block is fetched from, so a query row gets the same bits on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.ops.attention.checks import check_heads, check_scale
from vexact.ops.cpu.product import batched, even_rows
from vexact.ops.cpu.reduce import tree_sum

KEY_BLOCK = 64  # a constant of the numerics
# (sequence of each tile (N,), key positions (KEY_BLOCK,)) -> keys and values (N, KEY_BLOCK, Hkv, D)
FetchKeys = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class _Tiles:
    """N query tiles; rows past the end of their sequence repeat its last row and are dropped at the end."""

    sequence: Tensor  # (N,)
    rows: Tensor  # (N, tile) index into the packed queries
    valid: Tensor  # (N, tile)
    num_visible: Tensor  # (N, tile) how many leading keys each row sees

    @classmethod
    def build(cls, cu_seqlens_q: Tensor, num_keys: Tensor, size: int, causal: bool) -> _Tiles:
        start, num_queries = cu_seqlens_q[:-1].long(), cu_seqlens_q.diff().long()
        tiles_per_sequence = (num_queries + size - 1) // size
        sequence = torch.repeat_interleave(torch.arange(len(num_queries)), tiles_per_sequence)
        first_tile = tiles_per_sequence.cumsum(0) - tiles_per_sequence
        tile = torch.arange(len(sequence)) - first_tile[sequence]
        query = tile.unsqueeze(1) * size + torch.arange(size)
        total = num_queries[sequence].unsqueeze(1)
        keys = num_keys.long()[sequence].unsqueeze(1)
        seen = query + 1 + keys - total if causal else keys.expand_as(query)
        rows = start[sequence].unsqueeze(1) + query.minimum(total - 1)
        valid = query < total
        return cls(sequence, rows, valid, torch.where(valid, seen.clamp_min(0), 0).minimum(keys))


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(T, Hq, D), (Tk, Hkv, D), (Tk, Hkv, Dv) -> out (T, Hq, Dv), lse (T, Hq) fp32; 0 and -inf past the sequences."""
    check_heads(q, k, v)
    check_scale(scale)
    first, num_keys = cu_seqlens_k[:-1].long(), cu_seqlens_k.diff().long()

    def fetch(sequence: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        last = (num_keys[sequence] - 1).unsqueeze(1)
        index = first[sequence].unsqueeze(1) + positions.unsqueeze(0).minimum(last)
        return k[index], v[index]

    tiles = _Tiles.build(cu_seqlens_q, num_keys, _tile_size(q.shape[1], k.shape[1]), causal)
    return _forward(q, v.shape[-1], tiles, fetch, k.shape[1], scale)


def paged_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) over pages (num_pages, page_size, Hkv, D) -> out (T, Hq, Dv), lse (T, Hq) fp32."""
    check_heads(q, k_cache, v_cache)
    check_scale(scale)
    page_size = k_cache.shape[1]
    flat_k, flat_v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    table, num_keys = block_table.long(), seqused_k.long()

    def fetch(sequence: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        clamped = positions.unsqueeze(0).minimum((num_keys[sequence] - 1).unsqueeze(1))
        page = table[sequence].gather(1, clamped // page_size)
        index = page * page_size + clamped % page_size
        return flat_k[index], flat_v[index]

    tiles = _Tiles.build(cu_seqlens_q, num_keys, _tile_size(q.shape[1], k_cache.shape[2]), causal)
    return _forward(q, v_cache.shape[-1], tiles, fetch, k_cache.shape[2], scale)


def _tile_size(num_heads: int, num_kv_heads: int) -> int:
    """Query rows of a tile; few, since a decoded token fills a tile alone."""
    group = num_heads // num_kv_heads
    return even_rows(group) // group


def _forward(
    q: Tensor, value_dim: int, tiles: _Tiles, fetch: FetchKeys, num_kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    (num_tiles, size), num_heads = tiles.rows.shape, q.shape[1]
    group = num_heads // num_kv_heads
    # (N, Hkv, group*tile, D): the query heads of a group share a tile, as they share keys
    queries = q[tiles.rows].float().unflatten(2, (num_kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    queries = queries.contiguous()
    visible = tiles.num_visible.repeat(1, group)[:, None, :, None]  # (N, 1, group*tile, 1)
    state = _State.empty(num_tiles, num_kv_heads, group * size, value_dim)
    reach = tiles.num_visible.amax(1) if num_tiles else tiles.num_visible.new_zeros(0)
    for block_start in range(0, int(reach.max()) if num_tiles else 0, KEY_BLOCK):
        active = (reach > block_start).nonzero().squeeze(1)
        positions = torch.arange(block_start, block_start + KEY_BLOCK)
        keys, values = fetch(tiles.sequence[active], positions)
        in_reach = (positions < reach[active].unsqueeze(1))[:, :, None, None]
        keys = keys.float().permute(0, 2, 3, 1)  # (n, Hkv, D, block)
        values = values.float().masked_fill(~in_reach, 0.0).permute(0, 2, 1, 3)
        state.step(active, queries[active], keys, values, positions < visible[active], scale)
    out, lse = state.finish(scale)
    out = out.unflatten(2, (group, size)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (N, tile, Hq, Dv)
    lse = lse.unflatten(2, (group, size)).permute(0, 3, 1, 2).flatten(2, 3)
    packed_out = torch.zeros(q.shape[0], num_heads, value_dim, dtype=q.dtype)
    packed_lse = torch.full((q.shape[0], num_heads), float("-inf"))
    rows = tiles.rows[tiles.valid]
    packed_out[rows] = out[tiles.valid].to(q.dtype)
    packed_lse[rows] = lse[tiles.valid]
    return packed_out, packed_lse


@dataclass(slots=True, eq=False)
class _State:
    """Running online softmax of N tiles: raw row maximum, row sum and unnormalised output."""

    top: Tensor  # (N, Hkv, M, 1)
    total: Tensor  # (N, Hkv, M, 1)
    acc: Tensor  # (N, Hkv, M, Dv)

    @classmethod
    def empty(cls, num_tiles: int, num_heads: int, rows: int, value_dim: int) -> _State:
        shape = (num_tiles, num_heads, rows)
        return cls(torch.full((*shape, 1), float("-inf")), torch.zeros(*shape, 1), torch.zeros(*shape, value_dim))

    def step(self, active: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> None:
        """Folds one key block in. A block that is wholly masked for a row leaves that row's state as it was."""
        scores = _bmm(q, k).masked_fill_(~mask, float("-inf"))
        top = self.top[active]
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        anchor = new_top.masked_fill(new_top == float("-inf"), 0.0)
        probs = torch.exp((scores - anchor) * scale)
        alpha = torch.exp((top - anchor) * scale)
        self.total[active] = self.total[active] * alpha + tree_sum(probs).unsqueeze(-1)
        self.acc[active] = self.acc[active] * alpha + _bmm(probs, v)
        self.top[active] = new_top

    def finish(self, scale: float) -> tuple[Tensor, Tensor]:
        """out (N, Hkv, M, Dv) and natural-log lse (N, Hkv, M)."""
        out = self.acc / self.total.masked_fill(self.total == 0, 1.0)
        return out, (self.top * scale + torch.log(self.total)).squeeze(-1)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product whose matrices keep one fixed shape, hence fixed bits."""
    n, heads = a.shape[:2]
    return batched(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (n, heads))
