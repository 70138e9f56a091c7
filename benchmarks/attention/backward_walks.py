"""Launch configurations of the warp-specialised backward that are worth a try, by kernel and head dimension."""

from __future__ import annotations

from vexact.ops.kernels.attention.hopper.backward.host import Walk

_WIDE = (240, 24)
CANDIDATES: dict[tuple[str, int], tuple[Walk, ...]] = {
    ("queries", 128): (
        Walk(64, 3), Walk(64, 3, False), Walk(64, 3, True, *_WIDE), Walk(64, 2), Walk(64, 4), Walk(128, 2),
    ),
    ("keys", 128): (
        Walk(64, 3, True, *_WIDE), Walk(64, 3, False, *_WIDE), Walk(64, 4, True, *_WIDE), Walk(32, 4, True, *_WIDE),
        Walk(32, 8, True, *_WIDE),
    ),
    ("queries", 64): (Walk(128, 4), Walk(128, 4, False), Walk(128, 3), Walk(128, 2), Walk(64, 6), Walk(64, 4)),
    ("keys", 64): (Walk(64, 6), Walk(64, 6, False), Walk(64, 4), Walk(64, 6, True, *_WIDE), Walk(32, 8)),
    ("queries", 192): (Walk(64, 3), Walk(64, 3, False), Walk(64, 2), Walk(64, 3, True, *_WIDE), Walk(32, 4)),
    ("keys", 192): (Walk(32, 6, True, *_WIDE), Walk(32, 6, False, *_WIDE), Walk(32, 4, True, *_WIDE), Walk(32, 4)),
}  # fmt: skip
