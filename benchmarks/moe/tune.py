"""Time candidate tiles of the grouped products on this GPU; every one of them must give the same bits.

    python -m benchmarks.moe.tune --out tune.json

The tables in vexact/ops/kernels/moe/tiles.py are read off the result by hand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from itertools import product as combinations
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.moe.cases import MOONLIGHT, QWEN3, MoeShape, draw_groups, make_weights
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import out_file
from vexact.ops.kernels import linear, swiglu
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.moe import grouped_linear

KINDS = ("gated", "gate_up", "down", "grad_act", "grad_x", "grad_gate_up", "grad_down")
TOKENS = (1, 8, 16, 64, 128, 256, 1024, 4096, 5120, 16384)
GATHERED = ("gated", "gate_up", "grad_gate_up")
BUDGETS = (72, 110, 215)  # KiB of shared memory: three, two and one program a multiprocessor


def few_tiles(rows: int, halves: int) -> Iterator[Tile]:
    """Candidates for few rows an expert; a gated product has two weight tiles."""
    block_ms = (16,) if rows <= 8 else (16, 32, 64)
    for bm, bn, bk in combinations(block_ms, (32, 64, 128), (64, 128, 256)):
        if bm * bn > 64 * 128 or bn * bk * halves < 4096 or bn * bk > 16384 or (bm == 64 and bn == 32):
            continue
        for swap in (False, True) if bm < 64 <= bn else (False,):
            for kib in BUDGETS[:2]:
                stages = min(6, kib * 1024 // ((bm + halves * bn) * bk * 2))
                if stages >= 3:
                    yield Tile("tma", bm, bn, bk, 4, stages, swap=swap)


def many_tiles(halves: int) -> Iterator[Tile]:
    """Candidates for many rows an expert."""
    if halves == 2:
        yield from (Tile("tma", 128, 128, 64, 8, stages) for stages in (3, 4))
        yield from (Tile("tma", 128, 128, 64, 8, 4, splits=splits, waves=w) for splits in (2, 4) for w in (0, 1))
        yield from (Tile("tma", 128, 128, 64, 8, 3, splits=2, waves=1), Tile("tma", 128, 64, 64, 4, 3))
        yield from (
            Tile("tma", 128, 64, 64, 4, 3, waves=2),
            Tile("tma", 256, 64, 64, 8, 4),
            Tile("tma", 64, 64, 64, 4, 4),
        )
        yield from (Tile("tma", 64, 128, 64, 4, 4), Tile("tma", 128, 128, 128, 8, 2))
        # two programs a multiprocessor, of which one multiplies while the other finds its rows
        yield from (Tile("tma", 64, 128, 64, 4, 2, splits=2), Tile("tma", 128, 64, 64, 4, 3, splits=2))
        yield from (Tile("tma", 64, 128, 64, 8, 4, splits=2), Tile("tma", 128, 128, 64, 8, 3, splits=2))
        return
    yield from (Tile("tma", 128, 256, 64, 8, stages, splits=4, waves=1) for stages in (3, 4))
    yield from (Tile("tma", 256, 128, 64, 8, 4, splits=4, waves=1), Tile("tma", 128, 256, 64, 8, 3, splits=4, waves=0))
    yield from (Tile("tma", 128, 256, 64, 8, 4, splits=4), Tile("tma", 128, 256, 64, 8, 3, splits=2))
    yield from (Tile("tma", 128, 128, 64, 4, 3, splits=2, waves=2), Tile("tma", 128, 128, 64, 4, 3, splits=2))
    yield from (Tile("tma", 128, 128, 64, 4, 3, splits=4), Tile("tma", 128, 128, 64, 8, 3, splits=4))
    yield from (Tile("tma", 64, 128, 64, 4, 4), Tile("tma", 64, 256, 64, 4, 4))


def sum_tiles() -> Iterator[Tile]:
    """Candidates for a weight gradient. Two stages hold the indices of gathered rows."""
    yield from (Tile("tma", 128, 128, 32, 4, stages) for stages in (5, 6, 7))
    yield from (Tile("tma", 128, 128, 64, 4, 5), Tile("tma", 128, 256, 64, 8, 4), Tile("tma", 128, 256, 64, 8, 6))
    yield from (Tile("tma", 128, 256, 64, 8, 8), Tile("tma", 128, 128, 64, 4, 7))
    yield from (Tile("tma", 256, 128, 64, 8, 4), Tile("tma", 256, 128, 64, 8, 6), Tile("tma", 128, 256, 32, 8, 7))
    yield Tile("tma", 256, 128, 32, 8, 7)


def candidates(kind: str, tokens: int, shape: MoeShape) -> list[Tile]:
    rows = tokens * shape.top_k // shape.experts
    halves = 2 if kind == "gated" else 1
    if kind in ("grad_gate_up", "grad_down"):
        return list(sum_tiles())
    tiles = list(few_tiles(rows, halves)) if rows <= 32 and kind in ("gated", "down") else []
    if rows >= 8:
        tiles += many_tiles(halves)
    return list(dict.fromkeys(tiles))


def launch(kind: str, tile: Tile, x: Tensor, weight: Tensor, rows: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """One product; ``x`` is that of tokens where it is gathered, ``weight`` the other factor of a weight gradient."""
    if kind in ("grad_gate_up", "grad_down"):
        given = rows if kind in GATHERED else None
        return grouped_linear.grad_weight(weight, x, given, offsets, top_k, tile=tile)
    if kind in ("grad_act", "grad_x"):
        weight = weight.transpose(1, 2)
    given = rows if kind in GATHERED else None
    return grouped_linear.product(x, weight, given, offsets, top_k, gated=kind == "gated", tile=tile)


def work(shapes: list[MoeShape], tokens: tuple[int, ...], kinds: Sequence[str]) -> Iterator[tuple[MoeShape, str, int]]:
    for shape, count, kind in combinations(shapes, tokens, kinds):
        if count >= 4096 or (kind in ("gated", "down")):
            yield shape, kind, count


def compile_only(kind: str, tile: Tile, experts: int, top_k: int) -> str | None:
    """Compile without launching; returns what went wrong."""
    from triton.runtime.jit import JITFunction

    JITFunction.__getitem__ = lambda self, grid: lambda *a, **kw: self.run(*a, grid=grid, warmup=True, **kw)

    def meta(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.bfloat16, device="meta")

    rows, offsets = (torch.empty(n, dtype=torch.int32, device="meta") for n in (64 * top_k, experts + 1))
    sums = kind in ("grad_gate_up", "grad_down")
    x = meta(64 if kind in GATHERED else 64 * top_k, 512)
    try:
        launch(kind, tile, x, meta(64 * top_k, 512) if sums else meta(experts, 512, 512), rows, offsets, top_k)
    except Exception as error:  # a candidate that does not compile is a result of the search
        return f"{type(error).__name__}: {error}"[:200]
    return None


def compile_all(cases: list[tuple[MoeShape, str, int]], jobs: int) -> None:
    unique = {
        (kind, tile, shape.experts, shape.top_k) for shape, kind, n in cases for tile in candidates(kind, n, shape)
    }
    print(f"{len(unique)} candidates", flush=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for one, problem in zip(unique, pool.map(compile_only, *zip(*unique, strict=True))):
            if problem:
                print("cannot compile", one, problem)


def calls_of(shape: MoeShape, kind: str, tokens: int) -> list[Callable[[Tile], Tensor]]:
    """The product with as many routings as it takes to leave the cache."""
    weights = WEIGHTS[shape.name]
    pairs = tokens * shape.top_k
    routings = [draw_groups(shape, tokens, seed=s) for s in range(max(1, min(16, 256 // tokens)))]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    x = draw(tokens if kind in GATHERED else pairs, shape.width if kind in ("down", "grad_down") else shape.hidden)
    if kind == "grad_x":
        x = draw(pairs, 2 * shape.width)
    other = weights.gate_up if kind in ("gated", "gate_up", "grad_x") else weights.down
    if kind in ("grad_gate_up", "grad_down"):
        other = draw(pairs, 2 * shape.width if kind == "grad_gate_up" else shape.hidden)
    return [
        lambda tile, rows=rows, offsets=offsets: launch(kind, tile, x, other, rows, offsets, shape.top_k)
        for rows, _, offsets in routings
    ]


def stock_calls(shape: MoeShape, kind: str, tokens: int) -> list[Callable[[], object]]:
    """torch's grouped product of the same size, of rows that are gathered already."""
    weights, pairs = WEIGHTS[shape.name], tokens * shape.top_k
    weight = weights.down if kind in ("down", "grad_act") else weights.gate_up
    x = torch.randn(pairs, weight.shape[1 if kind.startswith("grad") else 2], device="cuda", dtype=torch.bfloat16)
    ends = [draw_groups(shape, tokens, seed=s)[2][1:] for s in range(max(1, min(16, 256 // tokens)))]
    matrix = weight if kind.startswith("grad") else weight.transpose(1, 2)
    return [lambda end=end: torch.nn.functional.grouped_mm(x, matrix, offs=end) for end in ends]


def rows_unlike_linear(shape: MoeShape, tokens: int) -> int:
    """Rows of the first experts that differ from those of ``linear`` and ``swiglu``."""
    weights, different = WEIGHTS[shape.name], 0
    rows, _, offsets = draw_groups(shape, tokens, "skewed")
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    act = grouped_linear.swiglu_forward(x, weights.gate_up, rows, offsets, shape.top_k)
    out = grouped_linear.forward(act, weights.down, None, offsets, shape.top_k)
    ends = offsets.tolist()
    for expert in range(12):
        own = slice(ends[expert], ends[expert + 1])
        gate_up = linear.forward(x[rows[own].long() // shape.top_k], weights.gate_up[expert], None, torch.bfloat16)
        one = swiglu.forward(gate_up)
        different += int((one != act[own]).any(1).sum())
        different += int((linear.forward(one, weights.down[expert], None, torch.bfloat16) != out[own]).any(1).sum())
    return different


WEIGHTS: dict = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, default=Path("tune_moe.json"))
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args()
    began = time.monotonic()
    some = tuple(tokens for tokens in (16, 256, 4096) if tokens in args.tokens)
    cases = [*work([QWEN3], args.tokens, args.kinds), *work([MOONLIGHT], some, args.kinds)]
    compile_all(cases, args.jobs)
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    for shape in (QWEN3, MOONLIGHT):
        WEIGHTS[shape.name] = make_weights(shape)
    record: dict = {**environment(), "cases": []}
    for shape, tokens in combinations((QWEN3, MOONLIGHT), (1, 64, 700)):
        print(f"{shape.name} {tokens} tokens: {rows_unlike_linear(shape, tokens)} rows differ from linear", flush=True)
    for shape, kind, tokens in cases:
        if time.monotonic() - began > args.seconds:
            print("out of time at", shape.name, kind, tokens)
            break
        calls, timed, expected, different = calls_of(shape, kind, tokens), [], None, 0
        for tile in candidates(kind, tokens, shape):
            try:
                out = calls[0](tile)
                torch.cuda.synchronize()
            except OutOfResources:
                continue
            expected = out.clone() if expected is None else expected
            different += int((out != expected).flatten(1).any(1).sum())
            ms = median_ms([lambda call=call, tile=tile: call(tile) for call in calls], target_ms=1.0, replays=3)
            timed.append((ms * 1e3, astuple(tile)))
        timed.sort()
        stock = float("nan")
        if kind not in ("gated", "grad_gate_up", "grad_down"):
            stock = median_ms(stock_calls(shape, kind, tokens), target_ms=1.0, replays=3) * 1e3
        case = {"shape": shape.name, "kind": kind, "tokens": tokens, "stock_us": stock, "rows_different": different}
        record["cases"].append({**case, "tiles": timed})
        best = "  ".join(f"{us:.1f} {list(tile[1:6]) + list(tile[7:])}" for us, tile in timed[:5])
        print(f"{shape.name[:5]} {kind:12s} {tokens:6d} stock {stock:8.1f} differ {different} | {best}", flush=True)
        args.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
