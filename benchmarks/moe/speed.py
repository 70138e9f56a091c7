"""The mixture-of-experts layer on one GPU: bits first, then times beside torch and transformers and the memory floor.

    python -m benchmarks.moe.speed                     # prints the tables
    python -m benchmarks.moe.speed --quick             # fewer sizes
    python -m benchmarks.moe.speed --out results.json  # and keeps them

Bits: every row of the grouped products, under several routings, sizes and tiles, against ``linear`` and ``swiglu`` of
that row with its expert's matrix. What fails is named and kept with the others' figures; exit 1 if a row differs or
something failed. Times: medians of graph replays; routings change from call to call, so that decoding finds its
experts' weights cold. The floor is the bytes of the experts hit at 3.0 TB/s. Peers follow in the same run, each in a
process of its own (``peers.py``); what could not be run stands in their ``not_run``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from benchmarks.moe.bits import bit_cases, count_rows
from benchmarks.moe.cases import MOONLIGHT, QWEN3, MoeShape, make_weights
from benchmarks.moe.layer import Layer, floor_us
from benchmarks.moe.peers import PEERS, in_its_own_process
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import needs_gpu, out_file
from benchmarks.shared.roofline import HBM_BYTES_PER_S
from vexact.ops.kernels.moe import few

DECODE = (1, 2, 4, 8, 16, 64, 128, 256)
MANY = (1024, 4096, 5120, 16384, 32768)
QUICK = (1, 16, 128, 4096, 16384)
SHAPES = (QWEN3, MOONLIGHT)
PARTS = ("layer", "route_and_group", "gate_up", "gate_up_alone", "gate_up_in_place", "down", "combine")
STOCK = ("stock_gather_gate_up", "stock_gate_up", "stock_down", "stock_layer")
TRAIN = (4096, 16384, 32768)
Named = tuple[str, Future[Any]]


def many_times(layer: Layer, tokens: int, what: str) -> float:
    """Microseconds of one call; ``what`` names a method of the layer that prepares one call for one routing."""
    routings = max(1, min(16, 256 // tokens))
    calls = [getattr(layer, what)(tokens, seed) for seed in range(routings)]
    return median_ms(calls, target_ms=2.0, replays=5) * 1e3


def time_forward(layer: Layer, tokens: int) -> dict[str, float]:
    """The whole layer, its parts, and the others'."""
    case = {part: many_times(layer, tokens, part) for part in (*PARTS, *STOCK)}
    if tokens <= few.TOKENS:
        case["few"] = many_times(layer, tokens, "few")
    case["floor"] = floor_us(layer, tokens, HBM_BYTES_PER_S)
    case["tflops"] = layer.shape.flops(tokens) / case["layer"] / 1e6
    case["stock_tflops"] = layer.shape.flops(tokens) / case["stock_layer"] / 1e6
    return case


def time_training(layer: Layer, tokens: int) -> dict[str, float]:
    """Forward and backward with autograd, in TFLOP/s of three forwards, and the activations kept for the backward."""
    record: dict[str, float] = {}
    for name in ("train", "stock_train"):
        step = getattr(layer, name)(tokens, 0)
        step()
        times = []
        for _ in range(4):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        record[f"{name}_ms"] = median(times)
        record[f"{name}_tflops"] = 3 * layer.shape.flops(tokens) / median(times) / 1e9
        record[f"{name}_saved_gib"], record[f"{name}_peak_gib"] = layer.memory(step)
    parts = {f"{part}_us": many_times(layer, tokens, part) for part in layer.BACKWARD}
    return record | parts


def prepare(shape: MoeShape, tokens: int, training: bool) -> None:
    """Run everything once, so that it is compiled and in the cache on disk."""
    layer = Layer(shape, make_weights(shape))
    for part in (*PARTS, *(("few",) if tokens <= few.TOKENS else ()), *(layer.BACKWARD if training else ())):
        getattr(layer, part)(tokens, 0)()
    if training:
        layer.train(tokens, 0)()
    torch.cuda.synchronize()
    del layer
    torch.cuda.empty_cache()


def attempt(errors: dict[str, str], what: str, call: Callable[[], Any]) -> Any:
    """Result of ``call``; None with an entry in ``errors`` if it fails, so that the others still get their figures."""
    try:
        return call()
    except Exception as error:  # whatever a compiler or a device may raise
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        errors[what] = f"{type(error).__name__}: {first}"
        print(f"{what} FAILED: {errors[what]}", flush=True)
        return None


def compare_and_compile(
    quick: bool, forward: tuple[int, ...], train: tuple[int, ...], errors: dict[str, str]
) -> dict[str, dict[str, int]]:
    """Compares all rows, in several processes, which also compile what will be timed; each shape has its own, because
    an error may leave a process without a usable device."""
    record = {}
    with ExitStack() as stack:
        work: list[tuple[MoeShape, list[Named], list[Named]]] = []
        for shape in SHAPES:
            pool = stack.enter_context(ProcessPoolExecutor(10 // len(SHAPES), mp_context=get_context("spawn")))
            prepared = [
                (f"{shape.name}, {tokens} tokens", pool.submit(prepare, shape, tokens, tokens in train))
                for tokens in sorted({*forward, *train})
                if tokens <= 16384
            ]
            counts = [
                (f"{shape.name}, bits of {kind} {tokens}", pool.submit(count_rows, shape, kind, tokens))
                for kind, tokens in bit_cases(quick)
            ]
            work.append((shape, prepared, counts))
        for shape, prepared, counts in work:
            found = [attempt(errors, name, future.result) for name, future in counts]
            rows, different = (sum(pair[i] for pair in found if pair) for i in (0, 1))
            record[shape.name] = {"rows": rows, "different": different}
            print(f"{shape.name}: {rows:,} rows compared, {different} different", flush=True)
            for name, future in prepared:
                attempt(errors, f"{name}, first run", future.result)
    return record


def run(shape: MoeShape, forward: tuple[int, ...], train: tuple[int, ...], errors: dict[str, str]) -> dict[str, Any]:
    layer = Layer(shape, make_weights(shape))
    record: dict[str, Any] = {"forward": {}, "training": {}}
    print(f"\n{shape.name}: E {shape.experts} H {shape.hidden} I {shape.width} k {shape.top_k} shared {shape.shared}")
    print("tokens   layer   floor ratio TFLOP/s | route   gate_up: SwiGLU  plain  placed   down combine", end=" ")
    print("| torch: gather+gate_up  gate_up   down | layer TFLOP/s")
    for tokens in forward:
        case = attempt(errors, f"{shape.name}, {tokens} tokens", partial(time_forward, layer, tokens))
        if case is None:
            continue
        record["forward"][tokens] = case
        whole = f"{case['layer']:8.1f} {case['floor']:7.1f} {case['layer'] / case['floor']:5.2f} {case['tflops']:7.1f}"
        parts = " ".join(f"{case[part]:8.1f}" for part in PARTS[1:])
        stock = " ".join(f"{case[part]:8.1f}" for part in STOCK)
        two = f" | in two launches {case['few']:.1f}" if "few" in case else ""
        print(f"{tokens:6d}{whole} | {parts} | {stock} {case['stock_tflops']:7.1f}{two}", flush=True)
    for tokens in train:
        case = attempt(errors, f"{shape.name}, training on {tokens} tokens", partial(time_training, layer, tokens))
        if case is None:
            continue
        record["training"][tokens] = case
        figures = "  ".join(f"{name} {value:.2f}" for name, value in case.items())
        print(f"forward and backward, {tokens} tokens: {figures}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="other libraries, where installed"
    )
    parser.add_argument("--peer_seconds", type=float, default=60, help="of each peer and shape")
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    needs_gpu(parser)
    torch.manual_seed(0)
    began = time.monotonic()
    errors: dict[str, str] = {}
    record: dict[str, Any] = {**environment(), "floor_bytes_per_s": HBM_BYTES_PER_S, "shapes": {}, "errors": errors}
    print(f"{record['gpu']}, torch {record['torch']}, triton {record['triton']}")
    forward, train = (QUICK, QUICK[-1:]) if args.quick else ((*DECODE, *MANY), TRAIN)
    record["bits"] = compare_and_compile(args.quick, forward, train, errors)
    print(f"compared and compiled after {time.monotonic() - began:.0f} s", flush=True)
    for shape in SHAPES:
        figures = partial(run, shape, forward, train, errors)
        record["shapes"][shape.name] = attempt(errors, shape.name, figures)
        attempt(errors, f"after {shape.name}", torch.cuda.empty_cache)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    record["peers"] = {}
    for shape, name in product(SHAPES, args.peers):
        found = attempt(errors, f"{shape.name}, {name}", partial(in_its_own_process, name, shape, args.peer_seconds))
        record["peers"].setdefault(shape.name, {})[name] = found
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    for what, error in errors.items():
        print(f"{what} FAILED: {error}")
    print(f"done after {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(int(bool(errors) or any(bits["different"] for bits in record["bits"].values())))


if __name__ == "__main__":
    main()
