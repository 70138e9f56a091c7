"""Query rows: which program works on which rows of which sequence, and how a tile of rows is addressed.

A tile holds BLOCK_Q consecutive positions of one sequence times TILE_HEADS query heads that share a key/value head,
position-major. Sequence b owns the tiles `cu_seqlens_q[b] // BLOCK_Q + b` up to that of b + 1: enough for any
alignment. Rows past the last sequence count as one more, whose tiles write zeros. That makes at most
`T // BLOCK_Q + B + 1` tiles, a number the host knows without reading device memory.
"""

import triton
import triton.language as tl


@triton.jit
def find_sequence(cu_seqlens, num_sequences, tile, BLOCK: tl.constexpr):
    """(sequence, tile inside the sequence) of a tile number, by bisection."""
    low = 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        owned_from = tl.load(cu_seqlens + middle) // BLOCK + middle
        low = tl.where(owned_from <= tile, middle, low)
        high = tl.where(owned_from <= tile, high, middle - 1)
    return low, tile - (tl.load(cu_seqlens + low) // BLOCK + low)


@triton.jit
def unowned_rows(cu_seqlens, num_sequences, tile, BLOCK: tl.constexpr):
    """The first row of a tile that lies past the last sequence; negative for the tiles of sequences."""
    end = tl.load(cu_seqlens + num_sequences)
    index = tile - (end // BLOCK + num_sequences)
    return tl.where(index >= 0, end + index * BLOCK, -1)


@triton.jit
def row_coordinates(first, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_HEADS: tl.constexpr, q_len):
    """(position, head inside the tile, valid) of each of the BLOCK_M rows of a tile that starts at position `first`.

    Rows outside the sequence are clamped to its last position (and are not valid), so that no address leaves the
    sequence.
    """
    offs_m = tl.arange(0, BLOCK_M)
    position = first + offs_m // TILE_HEADS
    valid = (offs_m < BLOCK_Q * TILE_HEADS) & (position < q_len)
    return tl.minimum(position, q_len - 1), offs_m % TILE_HEADS, valid


@triton.jit
def key_limits(
    position, valid, first, q_len, kv_len, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr
):
    """(limit, end, full_end): keys visible to each row, keys visible to any row, and the part every row sees in whole
    blocks.

    Causal masks are aligned at the bottom right: query i of q_len sees keys 0 ... i + kv_len - q_len.
    """
    if CAUSAL:
        shift = kv_len - q_len + 1
        last = tl.minimum(first + BLOCK_Q, q_len)
        limit = tl.where(valid, tl.maximum(position + shift, 0), 0)
        end = tl.maximum(last - 1 + shift, 0)
        full_end = tl.maximum(first + shift, 0) // BLOCK_N * BLOCK_N
    else:
        limit = tl.where(valid, kv_len, 0)
        end = kv_len
        full_end = kv_len // BLOCK_N * BLOCK_N
    return limit, end, full_end
