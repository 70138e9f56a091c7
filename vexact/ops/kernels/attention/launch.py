"""Launch configurations as data, and the few numbers every launch derives from its tensors.

`KEY_BLOCKS` decides bits: it may depend on the dtype and the head dimensions, never on the batch, the GPU or the
kernel. The other tables were chosen for speed with `benchmarks/attention/tune.py`; any entry of the two forward tables
gives the same bits, while entries of the backward tables decide the last bits of gradients.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from vexact.ops.attention.checks import check_heads, check_scale
from vexact.ops.kernels.attention.batch import Batch
from vexact.ops.kernels.linear.launch import capability
from vexact.ops.kernels.sizes import next_power_of_2

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class KeyBlocks:
    """Keys per online-softmax step and keys per partial state (a multiple of it)."""

    block_n: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of a tile, warps and pipeline stages of a program. `block_n` is read by the backward only."""

    block_m: int
    num_warps: int
    num_stages: int
    block_n: int = 0


_DIMS = (32, 64, 128, 192, 256)  # classes of head dimensions: see HeadShape.key

# (element bytes, class of the head dimensions) -> key blocks
KEY_BLOCKS: dict[tuple[int, int], KeyBlocks] = {
    (2, 32): KeyBlocks(64, 2048),
    (2, 64): KeyBlocks(128, 2048),
    (2, 128): KeyBlocks(64, 2048),
    (2, 192): KeyBlocks(64, 2048),
    (2, 256): KeyBlocks(32, 2048),
    **{(4, dim): KeyBlocks(32, 2048) for dim in _DIMS},
}

FORWARD: dict[tuple[int, int], Tile] = {
    (2, 32): Tile(128, 4, 3),
    (2, 64): Tile(64, 4, 3),
    (2, 128): Tile(128, 8, 3),
    (2, 192): Tile(128, 8, 3),
    (2, 256): Tile(128, 8, 2),
    (4, 32): Tile(64, 4, 2),
    (4, 64): Tile(64, 4, 2),
    (4, 128): Tile(32, 4, 2),
    (4, 192): Tile(32, 4, 2),
    (4, 256): Tile(32, 8, 1),
}

# Where keys and values travel through tensor descriptors.
FORWARD_DESCRIBED: dict[tuple[int, int], Tile] = FORWARD | {(2, 256): Tile(128, 8, 3)}

# (element bytes, head dimension, value head dimension) of which sm_90 has warp-specialised kernels, in Gluon, with the
# same bits. Every other GPU, shape and feature has the Triton kernels.
WARP_SPECIALISED = {
    "forward": frozenset({(2, 64, 64), (2, 128, 128), (2, 192, 128), (2, 256, 256)}),
    "paged": frozenset({(2, 64, 64), (2, 128, 128), (2, 192, 128), (2, 256, 256)}),
    "backward": frozenset({(2, 64, 64), (2, 128, 128), (2, 192, 128)}),
}
# The passes that take them unasked, of "forward" and "backward" over packed sequences and "paged" (the chunks of
# prompts): those whose bits and speed have been compared on a GPU.
PROVEN = frozenset({"forward", "backward", "paged"})
# Releases of Triton that compile them, whose Gluon is experimental and changes, and those of them that the comparison
# ran with, without which they are not taken unasked.
GLUON_RELEASES = frozenset({(3, 6), (3, 7)})
PROVEN_RELEASES = frozenset({(3, 6)})
# By pass and head dimension, the work of an average tile (see `Batch.tile_work`) from which on nothing measured was
# slower than the Triton kernels; `benchmarks/attention/specialised.py` prints these lines.
LEAST_WORK: dict[tuple[str, int], float] = {
    ("forward", 64): 128, ("forward", 128): 64, ("forward", 192): 30, ("forward", 256): 30,
    ("backward", 64): 128, ("backward", 128): 64, ("backward", 192): 30,
    ("paged", 64): 336, ("paged", 128): 128, ("paged", 192): 336, ("paged", 256): 336,
}  # fmt: skip

# Rows of the decode tile follow the work; these are the warps and stages.
DECODE: dict[tuple[int, int], Tile] = {
    **{(2, dim): Tile(16, 4, 3) for dim in _DIMS},
    **{(4, dim): Tile(16, 4, 2) for dim in _DIMS},
}
MAX_DECODE_ROWS = 64

# block_m query rows walked by a program that owns block_n keys.
BACKWARD_KEYS: dict[tuple[int, int], Tile] = {
    (2, 32): Tile(64, 4, 2, 128),
    (2, 64): Tile(128, 4, 2, 64),
    (2, 128): Tile(64, 4, 2, 64),
    (2, 192): Tile(64, 8, 2, 64),
    (2, 256): Tile(32, 8, 1, 64),
    (4, 32): Tile(32, 4, 1, 32),
    (4, 64): Tile(32, 4, 1, 32),
    (4, 128): Tile(32, 8, 1, 32),
    (4, 192): Tile(32, 8, 1, 32),
    (4, 256): Tile(16, 8, 1, 16),
}

# block_n keys walked by a program that owns block_m query rows.
BACKWARD_QUERIES: dict[tuple[int, int], Tile] = {
    (2, 32): Tile(128, 4, 2, 64),
    (2, 64): Tile(64, 4, 3, 64),
    (2, 128): Tile(128, 8, 3, 64),
    (2, 192): Tile(128, 8, 2, 64),
    (2, 256): Tile(64, 8, 1, 32),
    (4, 32): Tile(32, 4, 1, 32),
    (4, 64): Tile(32, 4, 1, 32),
    (4, 128): Tile(32, 8, 1, 32),
    (4, 192): Tile(32, 8, 1, 32),
    (4, 256): Tile(16, 8, 1, 16),
}


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What the heads of one call look like; everything in it is a compile-time constant of the kernels."""

    num_heads: int
    num_kv_heads: int
    dim: int
    value_dim: int
    element_bytes: int

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def dim_pad(self) -> int:
        """Columns of the first tile of a key; those past it, if any, are in a second one."""
        return key_columns(self.dim, self.value_dim)[0]

    @property
    def value_dim_pad(self) -> int:
        return padded(self.value_dim)

    @property
    def key(self) -> tuple[int, int]:
        """Index into the tables: the larger of both dimensions, padded; 192 for keys in two tiles."""
        first, rest = key_columns(self.dim, self.value_dim)
        return self.element_bytes, 192 if rest else max(32, first, self.value_dim_pad)


@cache
def padded(dim: int) -> int:
    """The power of two, at least 16, that holds `dim` columns."""
    return max(16, next_power_of_2(dim))


@cache
def key_columns(dim: int, value_dim: int) -> tuple[int, int]:
    """Widths of the two tiles that hold a key; the second is 0 where one tile does.

    Two take the keys of latent attention (192 columns, values of 128), which would otherwise be padded to 256.
    """
    if 128 < dim <= 192 and value_dim <= 128:
        return 128, padded(dim - 128)
    return padded(dim), 0


def head_shape(q: Tensor, k: Tensor, v: Tensor) -> HeadShape:
    """Shape of the heads of q (T, Hq, D), k (..., Hkv, D) and v (..., Hkv, Dv).

    Raises:
        ValueError: see `check_heads`.
    """
    check_heads(q, k, v)
    return HeadShape(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], q.element_size())


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """Sizes, strides, types and devices of q, k and v, looked at once. One object for all equal ones: a short key."""

    shape: HeadShape


_forms: dict[Hashable, Form] = {}
_MOST_FORMS = 4096


def form(q: Tensor, k: Tensor, v: Tensor) -> Form:
    """The form of q (T, Hq, D), k (..., Hkv, D) and v (..., Hkv, Dv).

    Raises:
        ValueError: see `check_heads`.
    """
    sizes = q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()
    key = *sizes, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    found = _forms.get(key)
    if found is None:
        if len(_forms) >= _MOST_FORMS:
            _forms.clear()
        found = _forms.setdefault(key, Form(head_shape(q, k, v)))
    return found


def exponent_scale(softmax_scale: float) -> float:
    """`c` of the kernels: scores times `c` are base-2 exponents.

    Raises:
        ValueError: see `check_scale`.
    """
    check_scale(softmax_scale)
    return softmax_scale * LOG2E


def heads_per_tile(group: int, block_m: int) -> int:
    """The most query heads of a group that one tile of block_m rows can hold evenly."""
    return max(heads for heads in range(1, min(group, block_m) + 1) if group % heads == 0)


def chunk_to_merge(blocks: KeyBlocks, max_seqlen_k: int) -> int:
    """CHUNK of the forward kernel: 0, a variant without merges, where no sequence is longer than one chunk."""
    return blocks.chunk if max_seqlen_k > blocks.chunk else 0


def warp_specialised(
    kind: str, shape: HeadShape, device: torch.device, asked: bool | None = None, batch: Batch | None = None
) -> bool:
    """Whether the kernels of `attention/hopper` take these heads on this device in the pass `kind`, see PROVEN.

    asked: whether they are wanted; if omitted, where they are PROVEN and the tiles of the `batch` have LEAST_WORK.
    """
    releases = GLUON_RELEASES
    if asked is None:
        least = LEAST_WORK.get((kind, shape.dim))
        asked = kind in PROVEN and least is not None and (batch is None or batch.tile_work() >= least)
        releases = PROVEN_RELEASES
    known = (shape.element_bytes, shape.dim, shape.value_dim) in WARP_SPECIALISED[kind]
    here = device.type == "cuda" and capability(device) == (9, 0)
    return asked and known and here and triton_release() in releases


@cache
def triton_release() -> tuple[int, int]:
    """Major and minor number of the installed Triton."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
