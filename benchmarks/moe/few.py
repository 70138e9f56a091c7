"""A layer for one to four tokens in two launches beside the operators that it stands for: bits, then tiles.

    python -m benchmarks.moe.few --out few.json

Rows of many routings are compared first; exit 1 if one differs. Then µs of the layer, medians of graph replays over
routings, so that weights are cold: by operator, in two launches, and with every candidate tile of
``vexact/ops/kernels/moe/few.py``. ``few.UNASKED`` says for how many tokens layers take them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.moe.cases import DEVICE, MOONLIGHT, QWEN3, REHEARSAL, MoeShape, make_weights
from benchmarks.moe.layer import BF16, Layer, floor_us
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import at_least_one, needs_gpu, out_file
from benchmarks.shared.roofline import HBM_BYTES_PER_S
from vexact import ops
from vexact.ops.kernels.moe import combine, few, grouped_linear, router


def by_kernel(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``Layer.forward`` by the kernels themselves, which a rehearsal interprets."""
    settings = layer.shape.top_k, layer.shape.scoring, 1, 1, True, 1.0, BF16, 0
    _, weights, rows, slots, offsets = router.grouped_forward(logits, None, None, None, *settings)
    act = grouped_linear.swiglu_forward(x, layer.weights.gate_up, rows, offsets, layer.shape.top_k)
    y = grouped_linear.forward(act, layer.weights.down, None, offsets, layer.shape.top_k)
    shared = ops.linear(ops.swiglu(ops.linear(x, layer.shared[0])), layer.shared[1]) if layer.shared else None
    return combine.forward(y, weights, slots, shared)


@torch.no_grad()
def count_rows(layer: Layer, routings: int) -> tuple[int, int]:
    """Rows compared and rows that differ, over tokens, routings and tiles."""
    different, rows = torch.zeros((), dtype=torch.int64, device=DEVICE), 0
    for seed in range(routings):
        tokens = seed % few.TOKENS + 1
        x, logits = layer.inputs(tokens, seed)
        expected = by_kernel(layer, x, logits)
        at = seed // few.TOKENS
        tiles = {"gated_tile": few.GATED_TILES[at % len(few.GATED_TILES)]}
        tiles["down_tile"] = few.DOWN_TILES[at // len(few.GATED_TILES) % len(few.DOWN_TILES)]
        for found in (layer.few_forward(x, logits), layer.few_forward(x, logits, **tiles)):
            rows += tokens
            different += (found.view(torch.int16) != expected.view(torch.int16)).any(1).sum()
    return rows, int(different)


@torch.no_grad()
def count_rows_in_a_graph(layer: Layer, replays: int = 50) -> tuple[int, int]:
    """The same back to back, where a kernel begins before the one before it has ended."""
    inputs = [layer.inputs(seed % few.TOKENS + 1, seed) for seed in range(64)]
    expected = [by_kernel(layer, x, logits) for x, logits in inputs]
    layer.few_forward(*inputs[0])
    graph, different, rows = torch.cuda.CUDAGraph(), torch.zeros((), dtype=torch.int64, device=DEVICE), 0
    with torch.cuda.graph(graph):
        found = [layer.few_forward(x, logits) for x, logits in inputs]
    for _ in range(replays):
        for out in found:
            out.fill_(float("nan"))
        graph.replay()
        for one, other in zip(found, expected, strict=True):
            rows += one.shape[0]
            different += (one.view(torch.int16) != other.view(torch.int16)).any(1).sum()
    return rows, int(different)


def variants() -> dict[str, dict[str, Any]]:
    """Names and tuning of what is timed."""
    first = few.GATED_TILES[0], few.DOWN_TILES[0]
    found: dict[str, dict[str, Any]] = {"two launches": {}}
    found |= {f"gated {tile}": {"gated_tile": tile} for tile in few.GATED_TILES if tile != first[0]}
    return found | {f"down {tile}": {"down_tile": tile} for tile in few.DOWN_TILES if tile != first[1]}


def times(layer: Layer, tokens: int) -> dict[str, float]:
    """µs of one layer."""

    def us(call: Callable[[int, int], Any]) -> float:
        return median_ms([call(tokens, seed) for seed in range(16)], target_ms=2.0, replays=9) * 1e3

    case = {"operators": us(layer.layer)}
    for name, tuning in variants().items():
        case[name] = us(lambda tokens, seed, tuning=tuning: layer.few(tokens, seed, **tuning))
    return case | {"floor": floor_us(layer, tokens, HBM_BYTES_PER_S)}


def measure(shape: MoeShape, routings: int) -> dict[str, Any]:
    """Bits and times of one shape."""
    layer = Layer(shape, make_weights(shape))
    rows, different = count_rows(layer, routings)
    if torch.cuda.is_available():
        rows, different = (sum(pair) for pair in zip((rows, different), count_rows_in_a_graph(layer), strict=True))
    print(f"{shape.name}: {rows:,} rows compared, {different} different", flush=True)
    record: dict[str, Any] = {"rows": rows, "different": different, "tokens": {}}
    for tokens in range(1, few.TOKENS + 1) if torch.cuda.is_available() else ():
        case = times(layer, tokens)
        record["tokens"][tokens] = case
        print(f"{tokens}: " + "  ".join(f"{name} {value:.1f}" for name, value in case.items()), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routings", type=at_least_one, default=2000)
    parser.add_argument("--rehearse", action="store_true", help="bits of a tiny layer in Triton's interpreter")
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    if not args.rehearse:
        needs_gpu(parser)
    torch.manual_seed(0)
    record: dict[str, Any] = {} if args.rehearse else environment()
    for shape in (REHEARSAL,) if args.rehearse else (QWEN3, MOONLIGHT):
        record[shape.name] = measure(shape, args.routings)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(int(any(one["different"] for one in record.values() if isinstance(one, dict))))


if __name__ == "__main__":
    main()
