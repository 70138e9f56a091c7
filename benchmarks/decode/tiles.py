"""Search for the tiles of a layer's products inside of a whole decode step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from statistics import median
from typing import Any

from triton.runtime.errors import OutOfResources

from benchmarks.decode.step import Step
from vexact.ops.kernels import linear_swiglu
from vexact.ops.kernels.launches import forget
from vexact.ops.kernels.linear import select
from vexact.ops.kernels.linear.tiles import Tile

GAIN = 0.998  # of the step's time: a candidate has to gain more than its noise
REPLAYS, ROUNDS = 12, 5


def candidates(rows: int, halved: bool) -> list[Tile]:
    """Tiles for so many rows, their shared memory from a sixth to nearly all of a multiprocessor's, so that a waiting
    program finds room or not. ``halved``: columns count twice, for gate and up."""
    height = next((size for size in (16, 32, 64) if rows <= size), 64)
    tiles = []
    for width, depth in product((16, 32, 64, 128), (64, 128, 256)):
        columns = 2 * width if halved else width
        stage = 2 * depth * (height + columns)
        swap = height <= 32 and columns >= 64
        if height * columns < 1024 or height * columns > 64 * 128 or (halved and depth > 128):
            continue
        for kilobytes in (40, 72, 108, 200):
            stages = min(8, kilobytes * 1024 // stage)
            if stages >= 3:
                tiles.append(Tile("tma", height, width, depth, 4, stages, swap=swap))
    return list(dict.fromkeys(tiles))


def products(step: Step, fused: bool) -> dict[str, tuple[int, int] | None]:
    """By name: weight (N, K), or None for the product of gate and up with SwiGLU."""
    layer = step.model.layers[0]
    shapes = {
        "gate_up": None if fused else tuple(layer.mlp.gate_up_proj.weight.shape),
        "down": tuple(layer.mlp.down_proj.weight.shape),
        "qkv": tuple(layer.attention.qkv_proj.weight.shape),
        "o": tuple(layer.attention.o_proj.weight.shape),
    }
    return shapes  # type: ignore[return-value]


@contextmanager
def tile_in_use(shape: tuple[int, int] | None, rows: int, tile: Tile) -> Iterator[None]:
    """The product of this weight takes ``tile`` at up to so many rows."""
    if shape is None:
        before = linear_swiglu.TILES
        linear_swiglu.TILES = ((rows, tile), *before)
    else:
        key = ("forward", *shape)
        nearest = select.nearest_shape(*key)
        kept = select.TUNED.get(key)
        select.TUNED[key] = ((rows, tile), *select.TUNED[nearest])
        select.nearest_shape.cache_clear()
    forget()
    try:
        yield
    finally:
        if shape is None:
            linear_swiglu.TILES = before
        elif kept is None:
            del select.TUNED[key]
        else:
            select.TUNED[key] = kept
        select.nearest_shape.cache_clear()
        forget()


def search(
    step: Step,
    fused: bool,
    capture: Callable[[], Callable[[], object]],
    microseconds: Callable[[Callable[[], object], int], float],
    deadline: float,
) -> dict[str, Any]:
    """One product after another, those before it with what was found for them. Bits do not depend on a tile; that is
    what ``tune_linear.py`` checks."""
    found: dict[str, Any] = {}
    chosen: list[tuple[tuple[int, int] | None, Tile]] = []

    def timed(tiles: list[tuple[tuple[int, int] | None, Tile]]) -> float:
        if not tiles:
            run = capture()
            return median(microseconds(run, REPLAYS) for _ in range(ROUNDS))
        (shape, tile), *rest = tiles
        with tile_in_use(shape, step.rows, tile):
            return timed(rest)

    best = timed([])
    for name, shape in products(step, fused).items():
        rows = []
        for tile in candidates(step.rows, shape is None):
            if time.monotonic() > deadline:
                break
            try:
                rows.append((timed([*chosen, (shape, tile)]), tile))
            except OutOfResources:
                continue
        # the step without a candidate again: clocks drift in the meantime
        best = min(best, timed(chosen))
        fastest = min(rows, key=lambda row: row[0], default=None)
        if fastest is not None and fastest[0] < GAIN * best:
            best = fastest[0]
            chosen.append((shape, fastest[1]))
            found[name] = {"tile": repr(fastest[1]), "step_us": best}
        else:
            found[name] = {"tile": "the table's", "step_us": best}
        found[name]["candidates"] = [{"tile": repr(tile), "step_us": us} for us, tile in rows]
        print(f"  {name:8} {found[name]['step_us']:8.1f} us with {found[name]['tile']}", flush=True)
    return found
