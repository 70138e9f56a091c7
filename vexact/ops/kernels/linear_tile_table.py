"""Tuned tiles (H100), written by ``benchmarks/tune_linear.py``: layout and the two sizes that are not the batch.

``forward`` and ``grad_input`` are keyed by (n, k) and bounded by m; ``grad_weight`` is keyed by (m, n) and bounded by
the tokens k.
"""

from vexact.ops.kernels.linear_tiles import ShapeKey, Tile

LARGE = 1 << 62
TUNED: dict[ShapeKey, tuple[tuple[int, Tile], ...]] = {
    ("forward", 4096, 2048): (
        (16, Tile("tma", 16, 32, 128, 4, 6)),
        (64, Tile("tma", 64, 64, 128, 4, 4)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1)),
    ),
    ("grad_input", 2048, 4096): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1)),),
    ("grad_weight", 4096, 2048): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1)),),
}
