"""Linear layers against the vendor's library, in one run: forward at every batch size, and both gradients.

    python -m benchmarks.kernels.linear                      # prints the table
    python -m benchmarks.kernels.linear --out results.json   # and keeps it

Times are medians of graph replays over copies of the operands that do not fit the second-level cache. While timing,
every row is also compared with the same row of the largest batch.
"""

from __future__ import annotations

import argparse
import json
from math import exp, log

import torch

from benchmarks.kernels.linear_cases import LAYER_SHAPES, make_problem, rotation, stock_call
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import needs_gpu, out_file

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TRAIN_ROWS = (1024, 2048, 4096, 8192, 16384)
GRADIENT_ROWS = (4096, 16384)
GROUPS = {
    "forward, 1..256 rows": ("forward", DECODE_ROWS, 1.10),
    "forward, 1k..16k rows": ("forward", TRAIN_ROWS, 1.03),
    "grad_input": ("grad_input", GRADIENT_ROWS, 1.10),
    "grad_weight": ("grad_weight", GRADIENT_ROWS, 1.10),
}


def measure(layout: str, rows: int, n: int, k: int) -> dict[str, float]:
    """Both implementations twice, in turn; the better median of each counts."""
    copies = rotation(make_problem(layout, rows, n, k))
    ours, stock = [], []
    for _ in range(2):
        stock.append(median_ms([stock_call(copy) for copy in copies]))
        ours.append(median_ms([copy.run for copy in copies]))
    return {"stock_us": min(stock) * 1e3, "us": min(ours) * 1e3, "ratio": min(ours) / min(stock)}


def rows_different(n: int, k: int, most: int) -> tuple[int, int]:
    """(rows compared, rows that differ) between every batch size and one batch of ``most`` rows."""
    whole = make_problem("forward", most, n, k)
    expected = whole.run().clone()
    compared = differing = 0
    for rows in (*DECODE_ROWS, *(rows for rows in TRAIN_ROWS if rows < most)):
        part = make_problem("forward", rows, n, k)
        part.a, part.b = whole.a[most - rows :], whole.b
        part.out.fill_(float("nan"))
        compared += rows
        differing += int((part.run() != expected[most - rows :]).any(1).sum())
    return compared, differing


def most_rows(name: str) -> int:
    """The largest batch measured: the outputs of the vocabulary projection are large."""
    return 4096 if name.endswith("lm_head") else TRAIN_ROWS[-1]


def run_table() -> dict:
    """Measure every group and print one line per case and one per group."""
    record: dict = {**environment(), "cases": [], "groups": {}}
    for group, (layout, batches, target) in GROUPS.items():
        ratios = []
        for name, (n, k) in LAYER_SHAPES.items():
            for rows in batches:
                if rows > most_rows(name) or (layout != "forward" and name.endswith("lm_head")):
                    continue
                case = measure(layout, rows, n, k)
                ratios.append(case["ratio"])
                record["cases"].append({"layout": layout, "shape": name, "n": n, "k": k, "rows": rows, **case})
                print(
                    f"{layout:11s} {name:13s} {rows:6d} {case['stock_us']:9.1f} {case['us']:9.1f} {case['ratio']:.3f}"
                )
        mean = exp(sum(map(log, ratios)) / len(ratios))
        record["groups"][group] = {"geometric_mean": mean, "worst": max(ratios), "target": target, "cases": len(ratios)}
    totals = [rows_different(n, k, most_rows(name)) for name, (n, k) in LAYER_SHAPES.items()]
    record["rows_compared"], record["rows_different"] = (sum(column) for column in zip(*totals, strict=True))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    needs_gpu(parser)
    torch.manual_seed(0)
    print("layout      shape           rows  stock us   ours us ratio")
    record = run_table()
    for group, result in record["groups"].items():
        print(
            f"{group:24s} mean {result['geometric_mean']:.3f} (target {result['target']}) worst {result['worst']:.3f}"
        )
    print(f"rows compared across batch sizes: {record['rows_compared']}, different: {record['rows_different']}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
