"""Tuned tiles, written by ``benchmarks/kernels/tune_linear.py --write-table`` from timings on NVIDIA H100 80GB HBM3.

Layout and the two sizes that are not the batch -> (largest batch, tile). ``forward`` and ``grad_input`` name n and k
and are bounded by m; ``grad_weight`` names m and n and is bounded by k, the tokens. See ``select``.
"""

from vexact.ops.kernels.linear.tiles import LARGE, ShapeKey, Tile

TUNED: dict[ShapeKey, tuple[tuple[int, Tile], ...]] = {
    ("forward", 4096, 2048): (
        (16, Tile("pointer", 16, 64, 128, 4, 8, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 256, 4, 4, 8, 1, 0, True)),
        (64, Tile("tma", 64, 32, 256, 4, 4, 8, 1, 0, False)),
        (128, Tile("tma", 64, 64, 128, 4, 6, 8, 1, 0, False)),
        (256, Tile("tma", 64, 128, 64, 4, 8, 8, 1, 0, False)),
        (2048, Tile("tma", 256, 128, 64, 8, 4, 16, 4, 1, False)),
        (8192, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 3, 8, 2, 1, False)),
    ),
    ("forward", 2048, 2048): (
        (16, Tile("tma", 16, 64, 256, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 256, 4, 4, 8, 1, 0, True)),
        (64, Tile("tma", 64, 16, 256, 4, 5, 8, 1, 0, False)),
        (128, Tile("tma", 64, 32, 256, 4, 4, 8, 1, 0, False)),
        (256, Tile("tma", 64, 64, 128, 4, 6, 8, 1, 0, False)),
        (2048, Tile("tma", 128, 128, 64, 4, 6, 8, 2, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("forward", 12288, 2048): (
        (16, Tile("tma", 16, 64, 128, 4, 3, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 128, 4, 3, 8, 1, 0, True)),
        (64, Tile("tma", 64, 64, 128, 4, 3, 8, 1, 0, False)),
        (128, Tile("tma", 64, 64, 64, 4, 4, 8, 1, 0, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("forward", 2048, 6144): (
        (16, Tile("tma", 16, 64, 256, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 128, 4, 8, 8, 1, 0, True)),
        (64, Tile("tma", 64, 16, 256, 4, 5, 8, 1, 0, False)),
        (128, Tile("tma", 64, 32, 128, 4, 8, 8, 1, 0, False)),
        (256, Tile("tma", 64, 64, 128, 4, 6, 8, 1, 0, False)),
        (2048, Tile("tma", 128, 128, 64, 4, 6, 8, 2, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("forward", 6144, 4096): (
        (16, Tile("tma", 16, 64, 128, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 256, 4, 4, 8, 1, 0, True)),
        (64, Tile("tma", 64, 64, 128, 4, 6, 8, 1, 0, False)),
        (128, Tile("tma", 64, 128, 128, 4, 4, 8, 1, 1, False)),
        (2048, Tile("tma", 128, 128, 64, 4, 6, 8, 2, 1, False)),
        (8192, Tile("tma", 128, 256, 64, 8, 4, 16, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("forward", 4096, 4096): (
        (16, Tile("tma", 16, 64, 256, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 256, 4, 4, 8, 1, 0, True)),
        (64, Tile("tma", 64, 32, 256, 4, 4, 8, 1, 0, False)),
        (128, Tile("tma", 64, 64, 128, 4, 6, 8, 1, 0, False)),
        (256, Tile("tma", 64, 128, 64, 4, 8, 8, 1, 0, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("forward", 24576, 4096): (
        (16, Tile("tma", 16, 64, 256, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 256, 4, 4, 8, 1, 0, True)),
        (64, Tile("tma", 64, 128, 128, 4, 4, 8, 1, 0, False)),
        (128, Tile("tma", 64, 128, 128, 4, 4, 8, 1, 1, False)),
        (256, Tile("tma", 128, 128, 64, 4, 6, 8, 2, 1, False)),
        (8192, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 3, 8, 2, 1, False)),
    ),
    ("forward", 4096, 12288): (
        (16, Tile("tma", 16, 64, 256, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 256, 4, 4, 8, 1, 0, True)),
        (64, Tile("tma", 64, 32, 256, 4, 4, 8, 1, 0, False)),
        (128, Tile("tma", 64, 64, 128, 8, 6, 8, 1, 0, False)),
        (256, Tile("tma", 64, 128, 64, 4, 8, 8, 1, 0, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("forward", 151936, 2048): (
        (16, Tile("tma", 16, 64, 256, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 128, 128, 4, 5, 8, 1, 0, True)),
        (128, Tile("tma", 64, 128, 128, 4, 4, 8, 1, 1, False)),
        (256, Tile("tma", 128, 128, 64, 4, 6, 8, 2, 1, False)),
        (2048, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 4, 4, 1, False)),
    ),
    ("forward", 151936, 4096): (
        (16, Tile("tma", 16, 64, 256, 4, 5, 8, 1, 0, True)),
        (32, Tile("tma", 32, 64, 256, 4, 4, 8, 1, 0, True)),
        (64, Tile("tma", 64, 128, 128, 4, 4, 8, 1, 1, False)),
        (128, Tile("tma", 128, 128, 128, 8, 3, 8, 2, 1, False)),
        (256, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
        (2048, Tile("tma", 128, 256, 64, 8, 3, 8, 1, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 3, 8, 2, 1, False)),
    ),
    ("grad_input", 2048, 4096): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_input", 2048, 2048): (
        (8192, Tile("tma", 128, 256, 64, 8, 4, 16, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("grad_input", 2048, 12288): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_input", 6144, 2048): (
        (8192, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 3, 8, 2, 1, False)),
    ),
    ("grad_input", 4096, 6144): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_input", 4096, 4096): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_input", 4096, 24576): (
        (8192, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 3, 8, 1, 1, False)),
    ),
    ("grad_input", 12288, 4096): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_weight", 4096, 2048): (
        (8192, Tile("tma", 128, 256, 64, 8, 3, 8, 2, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("grad_weight", 2048, 2048): (
        (8192, Tile("tma", 128, 256, 64, 8, 4, 16, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("grad_weight", 12288, 2048): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_weight", 2048, 6144): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_weight", 6144, 4096): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
    ("grad_weight", 4096, 4096): (
        (8192, Tile("tma", 128, 256, 64, 8, 4, 4, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
    ),
    ("grad_weight", 24576, 4096): (
        (8192, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),
        (LARGE, Tile("tma", 128, 256, 64, 8, 4, 4, 4, 1, False)),
    ),
    ("grad_weight", 4096, 12288): ((LARGE, Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1, False)),),
}
