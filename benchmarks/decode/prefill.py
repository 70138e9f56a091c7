"""SwiGLU in the product of gate and up for the rows of a prefill step, against the two kernels, tile by tile.

    python -m benchmarks.decode.prefill --out benchmarks/results/prefill_h100.json

Of a prefill step of 8,192 tokens of Qwen3-1.7B shapes the SwiGLU kernel is some 7 % (its own figures times the layers,
in the step that ``rollout/throughput.py`` measures): it reads what the product has just stored. The product loses an
epilogue that overlaps the next tile's loads, so which is faster has to be measured. A tile that is faster belongs into
``TILES`` of ``vexact/ops/kernels/linear_swiglu.py``. Exit code 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernels.linear_cases import LAYER_SHAPES
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import needs_gpu, out_file
from vexact.ops.kernels import linear, linear_swiglu, swiglu
from vexact.ops.kernels.linear.tiles import Tile

ROWS = (256, 512, 1024, 2048, 8192)
SHAPES = ("1.7B gate_up", "8B gate_up")
TILES = [
    *(Tile("tma", 128, 128, 64, 8, 3, group) for group in (4, 8, 16)),
    *(Tile("tma", 256, 64, 64, 8, 3, group) for group in (4, 8)),
    *(Tile("tma", 128, 64, 64, warps, 4) for warps in (4, 8)),
    *(Tile("tma", 64, width, 64, 4, 4) for width in (64, 128)),
]


def measure(name: str, rows: int) -> dict:
    """Times of both ways, in turns with each other, and rows that differ."""
    out_features, depth = LAYER_SHAPES[name]
    x, weight = (
        torch.randn(count, depth, device="cuda", dtype=torch.bfloat16) / depth**0.5 for count in (rows, out_features)
    )

    def apart() -> torch.Tensor:
        return swiglu.forward(linear.forward(x, weight, None, x.dtype))

    expected = apart()
    slow, tiles = median_ms([apart] * 4), []
    for tile in TILES:
        try:
            found = linear_swiglu.product(x, weight, tile)
            torch.cuda.synchronize()
        except OutOfResources:
            continue
        wrong = int((found.view(torch.int16) != expected.view(torch.int16)).any(1).sum())
        ms = median_ms([lambda tile=tile: linear_swiglu.product(x, weight, tile)] * 4)
        tiles.append({"tile": repr(tile), "us": 1e3 * ms, "rows_different": wrong})
    slow = min(slow, median_ms([apart] * 4))
    best = min(tiles, key=lambda row: row["us"])
    print(f"{name} {rows:6}: apart {1e3 * slow:8.1f} us, at once {best['us']:8.1f} us with {best['tile']}", flush=True)
    compared = rows * len(tiles)
    return {"shape": name, "rows": rows, "apart_us": 1e3 * slow, "rows_compared": compared, "tiles": tiles}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    needs_gpu(parser)
    record = {**environment(), "results": [measure(name, rows) for name in SHAPES for rows in arguments.rows]}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    wrong = sum(tile["rows_different"] for result in record["results"] for tile in result["tiles"])
    print(f"{wrong} rows different")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
