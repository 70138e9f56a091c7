"""Search the tiles of the linear kernels on this GPU and check that every one of them gives the same bits.

python -m benchmarks.kernels.tune_linear --out tune.json           # time every candidate
python -m benchmarks.kernels.tune_linear --write-table tune.json   # write vexact/ops/kernels/linear/tile_table.py
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from math import exp, log
from multiprocessing import get_context
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernels.linear_cases import LAYER_SHAPES, Problem, make_problem, rotation, stock_call
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import out_file
from vexact.ops.kernels.linear import matmul
from vexact.ops.kernels.linear.select import select_tile
from vexact.ops.kernels.linear.tiles import LARGE, Tile

TABLE = Path(__file__).parents[2] / "vexact/ops/kernels/linear/tile_table.py"
TOLERANCE = 1.01  # tiles this close to the fastest count as equal, and the more widely useful one is taken
# The batch that was timed: the largest batch its tile is used for.
BOUNDS = {1: 16, 16: 16, 32: 32, 64: 64, 128: 128, 256: 256, 1024: 2048, 4096: 8192, 16384: LARGE}
TABLE_HEAD = '''"""Tuned tiles, written by ``benchmarks/kernels/tune_linear.py --write-table`` from timings on {device}.

Layout and the two sizes that are not the batch -> (largest batch, tile). ``forward`` and ``grad_input`` name n and k
and are bounded by m; ``grad_weight`` names m and n and is bounded by k, the tokens. See ``select``.
"""

from vexact.ops.kernels.linear.tiles import LARGE, ShapeKey, Tile

TUNED: dict[ShapeKey, tuple[tuple[int, Tile], ...]] = {{'''
DECODE_ROWS = (1, 16, 32, 64, 128, 256)
TRAIN_ROWS = (1024, 4096, 16384)
GRADIENT_ROWS = (4096, 16384)


def decode_tiles(rows: int) -> list[Tile]:
    """Candidates for a batch of at most 256 rows."""
    block_ms = {1: (16,), 16: (16,), 32: (32,), 64: (64,), 128: (64, 128), 256: (64, 128, 256)}[rows]
    tiles = []
    for bm, bn, bk, warps in product(block_ms, (16, 32, 64, 128), (64, 128, 256), (2, 4, 8)):
        swap = bm <= 32 and bn >= 64 and warps >= 4
        if bm * bn < 1024 * warps // 4 and not (bm == 16 and bn == 16 and warps <= 4):
            continue
        if (bm >= 64 and warps == 2) or bm * bn > 128 * 128 or (bm >= 128 and (bk == 256 or warps == 8)):
            continue
        stage = (bm + bn) * bk * 2
        for target in (72, 110, 200):
            stages = min(8, target * 1024 // stage)
            if stages >= 3:
                tiles.append(Tile("tma", bm, bn, bk, warps, stages, swap=swap))
        if bm <= 64 and bk >= 128 and 3 * stage <= 150 * 1024:
            tiles.append(Tile("pointer", bm, bn, bk, warps, min(7, 150 * 1024 // stage) + 1, swap=swap))
    return list(dict.fromkeys(tiles))


def train_tiles() -> list[Tile]:
    """Candidates for many rows, in the forward and in both gradients."""
    tiles = [Tile("tma", bm, bn, 64, 8, 4, group, 4, 1) for bm, bn in ((128, 256), (256, 128)) for group in (4, 8, 16)]
    tiles += [Tile("tma", bm, bn, 64, 8, 3, 8, splits, 1) for bm, bn in ((128, 256), (256, 128)) for splits in (1, 2)]
    tiles += [Tile("tma", 128, 128, 64, warps, stages, 8, 2, 1) for warps in (4, 8) for stages in (4, 6)]
    tiles += [Tile("tma", 128, 128, 64, 4, 3, 8, 2, 2), Tile("tma", 128, 128, 128, 8, 3, 8, 2, 1)]
    tiles += [Tile("tma", 64, 256, 64, 4, 4, 8, 4, 1), Tile("tma", 64, 128, 64, 4, 4, 8, 2, 2)]
    tiles += [Tile("tma", 128, 64, 64, 4, 4, 8, 2, 2), Tile("tma", 64, 128, 128, 4, 4, 8, 1, 1)]
    return tiles


def candidates(layout: str, rows: int) -> list[Tile]:
    if layout != "forward" or rows > 256:
        return train_tiles()
    return decode_tiles(rows) + (train_tiles() if rows >= 64 else [])


def work() -> Iterator[tuple[str, int, str, int, int]]:
    """(layout, rows, shape name, weight rows, weight columns), the small products first."""
    for rows in (*DECODE_ROWS, *TRAIN_ROWS):
        for name, (n, k) in LAYER_SHAPES.items():
            if not (name.endswith("lm_head") and rows > 4096):
                yield "forward", rows, name, n, k
    for layout in ("grad_input", "grad_weight"):
        for rows, (name, (n, k)) in product(GRADIENT_ROWS, LAYER_SHAPES.items()):
            if not name.endswith("lm_head"):
                yield layout, rows, name, n, k


def compile_only(layout: str, rows: int, tile: Tile) -> str | None:
    """Compile one candidate without launching it; returns what went wrong."""
    from triton.runtime.jit import JITFunction

    JITFunction.__getitem__ = lambda self, grid: lambda *a, **kw: self.run(*a, grid=grid, warmup=True, **kw)
    try:
        make_problem(layout, rows, 256, 256, device="meta").run(tile)
    except Exception as error:  # a candidate that does not compile is a result of the search
        return f"{type(error).__name__}: {error}"[:200]
    return None


def compile_all(jobs: int) -> None:
    """Fill Triton's cache in parallel: one binary serves every shape of a layout."""
    unique = {(layout, tile): rows for layout, rows, *_ in work() for tile in candidates(layout, rows)}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_only, layout, rows, tile): tile for (layout, tile), rows in unique.items()}
        for future, tile in futures.items():
            if future.result():
                print("cannot compile", tile, future.result())


def time_case(problem: Problem, tiles: list[Tile], deadline: float) -> list[dict]:
    """Time the stock product and every tile; each tile's output must equal the first one's, bit for bit."""
    copies = rotation(problem)
    stock = median_ms([stock_call(copy) for copy in copies])
    rows, expected = [], None
    for tile in tiles:
        if time.monotonic() > deadline:
            break
        copies[0].out.fill_(float("nan"))
        try:
            copies[0].run(tile)
            torch.cuda.synchronize()
        except OutOfResources as error:
            rows.append({"tile": tile_fields(tile), "error": f"{type(error).__name__}: {error}"[:120]})
            continue
        expected = copies[0].out.clone() if expected is None else expected
        differing = int((copies[0].out != expected).any(1).sum())
        ms = median_ms([lambda copy=copy, tile=tile: copy.run(tile) for copy in copies])
        rows.append({"tile": tile_fields(tile), "ms": ms, "ratio": ms / stock, "rows_different": differing})
    stock = min(stock, median_ms([stock_call(copy) for copy in copies]))
    return [{"stock_ms": stock}, *rows]


def check_rows_across_batches(n: int, k: int, rows: int) -> int:
    """Number of rows that some candidate, at some batch size, computes otherwise than the product of all rows does."""
    whole = make_problem("forward", rows, n, k)
    expected = whole.run(train_tiles()[0])
    differing = compared = 0
    for count in (*DECODE_ROWS, rows):
        for tile in candidates("forward", count):
            out = torch.full((count, n), float("nan"), dtype=torch.bfloat16, device="cuda")
            try:
                matmul(whole.a[:count], whole.b, out, layout="forward", tile=tile)
            except OutOfResources:
                continue
            differing += int((out != expected[:count]).any(1).sum())
            compared += count
    print(f"rows across batches n {n} k {k}: {compared} compared, {differing} different", flush=True)
    return differing


def tile_fields(tile: Tile) -> list:
    return [getattr(tile, field) for field in Tile.__dataclass_fields__]


def search(out: Path, budget_s: float, jobs: int) -> None:
    deadline = time.monotonic() + budget_s
    compile_all(jobs)
    print(f"compiled after {budget_s - deadline + time.monotonic():.0f} s", flush=True)
    different = {f"{n}x{k}": check_rows_across_batches(n, k, 8192) for n, k in ((2048, 6144), (4096, 2048))}
    results: list[dict] = []
    for layout, rows, name, n, k in work():
        if time.monotonic() > deadline:
            print("out of time at", layout, rows, name)
            break
        stock, *timed = time_case(make_problem(layout, rows, n, k), candidates(layout, rows), deadline)
        good = [row for row in timed if "ms" in row]
        best = min(good, key=lambda row: row["ms"])
        wrong = sum(row["rows_different"] for row in good)
        results.append({"layout": layout, "rows": rows, "shape": name, "n": n, "k": k, **stock, "tiles": timed})
        label = f"{layout:11s} {rows:6d} {name:12s} {stock['stock_ms'] * 1e3:9.1f} us"
        print(label, f"{best['ratio']:.3f} {best['tile']} differ {wrong}", flush=True)
        record = {**environment(), "rows_different": different, "results": results}
        out.write_text(json.dumps(record, separators=(",", ":")))


def choose(cases: list[dict], popularity: Counter) -> Tile:
    """The most popular tile among those within TOLERANCE of the fastest; ``cases`` share one table entry."""
    times: dict[tuple, float] = {}
    for tile in {tuple(row["tile"]) for row in cases[0]["tiles"] if "ms" in row}:
        found = [row["ms"] / case["stock_ms"] for case in cases for row in case["tiles"] if tuple(row["tile"]) == tile]
        if len(found) == len(cases):
            times[tile] = exp(sum(map(log, found)) / len(found))
    limit = min(times.values()) * TOLERANCE
    return Tile(*max((tile for tile, ms in times.items() if ms <= limit), key=lambda t: (popularity[t], -times[t])))


def near_best(results: list[dict]) -> Counter:
    """How often each tile is within TOLERANCE of the fastest of its case."""
    counts: Counter = Counter()
    for case in results:
        good = [row for row in case["tiles"] if "ms" in row]
        limit = min(row["ms"] for row in good) * TOLERANCE
        counts.update(tuple(row["tile"]) for row in good if row["ms"] <= limit)
    return counts


def table_entries(results: list[dict]) -> dict[tuple[str, int, int], list[tuple[int, Tile]]]:
    """Per layout and weight shape: bounds on the batch and the tile up to that bound; equal neighbours are merged."""
    popularity = near_best(results)
    table: dict[tuple[str, int, int], list[tuple[int, Tile]]] = {}
    for layout, n, k in dict.fromkeys((case["layout"], case["n"], case["k"]) for case in results):
        cases = [case for case in results if (case["layout"], case["n"], case["k"]) == (layout, n, k)]
        entries: list[tuple[int, Tile]] = []
        for bound in sorted({BOUNDS[case["rows"]] for case in cases}):
            tile = choose([case for case in cases if BOUNDS[case["rows"]] == bound], popularity)
            if entries and entries[-1][1] == tile:
                entries.pop()
            entries.append((bound, tile))
        key = (layout, k, n) if layout == "grad_input" else (layout, n, k)
        table[key] = [*entries[:-1], (LARGE, entries[-1][1])]
    return table


def write_table(timings: Path) -> None:
    """Write the table module from a file that ``search`` wrote."""
    record = json.loads(timings.read_text())
    lines = [TABLE_HEAD.format(device=record["gpu"])]
    for key, entries in table_entries(record["results"]).items():
        lines.append(f"    {key!r}: (".replace("'", '"'))
        for bound, tile in entries:
            fields = ", ".join(repr(field).replace("'", '"') for field in tile_fields(tile))
            lines.append(f"        ({'LARGE' if bound == LARGE else bound}, Tile({fields})),")
        lines.append("    ),")
    TABLE.write_text("\n".join([*lines, "}", ""]))


def write_summary(timings: Path, out: Path) -> None:
    """Per case the tile that the table picks today and its time in the search; geometric means per group."""
    record = json.loads(timings.read_text())
    cases = []
    for case in record["results"]:
        layout, rows, n, k = case["layout"], case["rows"], case["n"], case["k"]
        sizes = {"forward": (rows, n, k), "grad_input": (rows, k, n), "grad_weight": (n, k, rows)}[layout]
        tile = tile_fields(select_tile(layout, *sizes, torch.bfloat16, descriptors=True))
        ms = next(row["ms"] for row in case["tiles"] if row["tile"] == tile)
        times = {"stock_us": case["stock_ms"] * 1e3, "us": ms * 1e3, "ratio": ms / case["stock_ms"]}
        cases.append({"layout": layout, "shape": case["shape"], "rows": rows, **times, "tile": tile})
    groups: dict[str, list[float]] = {}
    for case in cases:
        large = "many rows" if case["rows"] > 256 else "1..256 rows"
        groups.setdefault(f"{case['layout']}, {large}", []).append(case["ratio"])
    means = {
        name: {"geometric_mean": exp(sum(map(log, ratios)) / len(ratios)), "worst": max(ratios), "cases": len(ratios)}
        for name, ratios in groups.items()
    }
    for name, mean in means.items():
        print(f"{name:26s} mean {mean['geometric_mean']:.3f} worst {mean['worst']:.3f} of {mean['cases']}")
    head = {key: value for key, value in record.items() if key != "results"}
    out.write_text(json.dumps({**head, "groups": means, "cases": cases}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, default=Path("tune_linear.json"))
    parser.add_argument("--budget-s", type=float, default=3600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write-table", type=Path, metavar="TIMINGS")
    parser.add_argument("--summary", type=Path, metavar="TIMINGS")
    args = parser.parse_args()
    if args.summary:
        write_summary(args.summary, args.out)
    elif args.write_table:
        write_table(args.write_table)
    else:
        search(args.out, args.budget_s, args.jobs)


if __name__ == "__main__":
    main()
