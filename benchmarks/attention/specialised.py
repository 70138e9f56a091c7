"""The warp-specialised attention of sm_90 beside the Triton kernels: bits, then speed, on this GPU.

python -m benchmarks.attention.specialised [--out specialised.json] [--seconds 40] [--quick]

Bits: forward and backward of random batches (long, short and empty sequences, more and fewer keys than queries, causal
and not, every kind of heads), and the forward over pages of several sizes, until --seconds are over; every row of out,
lse, dq, dk and dv is compared. Speed: both families and cuDNN take turns, so that a clock that falls hits all alike, in
CUDA graphs, but for cuDNN's backward, which autograd calls: packed batches of 64 ... 32k tokens and many short ones,
prompts and chunks of prompts over pages, alone and beside decoding sequences; --quick: six of them. At the end the
lines of "launch.LEAST_WORK" that the figures make. Exit code 1 if one bit differs. "launch.PROVEN" names the passes
that take these kernels unasked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.attention.cases import Heads, backward_flops, packed_case, stock_backward, stock_forward
from benchmarks.attention.specialised_cases import (
    KINDS,
    PACKED,
    PAGE_SIZES,
    PAGED,
    QUICK,
    Job,
    least_lines,
    paged_pass,
    passes,
)
from benchmarks.shared.clock import environment
from benchmarks.shared.options import needs_gpu, out_file


def rows_different(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[int, int]:
    """Rows (token, head) compared, and those that differ in a bit."""
    words = {2: torch.int16, 4: torch.int32}
    compared = different = 0
    for x, y in zip(a, b, strict=True):
        unequal = x.view(words[x.itemsize]) != y.view(words[y.itemsize])
        compared += x.shape[0] * x.shape[1]
        different += int(unequal.reshape(x.shape[0] * x.shape[1], -1).any(1).sum())
    return compared, different


def random_lengths(rng: random.Random) -> tuple[list[int], list[int]]:
    edges = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257, 2047, 2048, 2049]
    q_lens = [rng.choice(edges) if rng.random() < 0.5 else rng.randint(0, 5000) for _ in range(rng.randint(1, 24))]
    if rng.random() < 0.5 or not sum(q_lens):
        q_lens = [*q_lens, 300]
    if rng.random() < 0.5:
        return q_lens, q_lens
    return q_lens, [max(0, length + rng.randint(-200, 900)) for length in q_lens[:-1]] + [q_lens[-1] + 5]


def compare_bits(seconds: float) -> dict[str, int]:
    names = "forward", "backward", "paged"
    found = {f"{name}_{what}": 0 for name in names for what in ("rows", "different")} | {"batches": 0}
    rng = random.Random(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = found["batches"]
        heads, dtype = KINDS[number % len(KINDS)]
        q_lens, k_lens = random_lengths(rng)
        causal = rng.random() < 0.8
        runs = passes(heads, dtype, q_lens, k_lens, causal, number)
        runs["paged"] = paged_pass(heads, dtype, q_lens, k_lens, rng.choice(PAGE_SIZES), causal, number)
        for name, run in runs.items():
            compared, different = rows_different(run(True), run(False))
            found[f"{name}_rows"] += compared
            found[f"{name}_different"] += different
        found["batches"] += 1
    return found


def mean_ms(call: Callable[[], object], count: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / count


def captured(call: Callable[[], object]) -> Callable[[], object]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def take_turns(calls: dict[str, Callable[[], object]], rounds: int = 7, round_ms: float = 8.0) -> dict[str, float]:
    """Median ms of each call."""
    counts = {}
    for name, call in calls.items():
        mean_ms(call, 1)
        counts[name] = max(2, int(round_ms / max(mean_ms(call, 2), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(mean_ms(call, counts[name]))
    return {name: median(values) for name, values in times.items()}


def measure(job: Job) -> list[dict]:
    heads, lengths = job.heads, job.q_lens
    if job.page_size:
        runs = {"paged": paged_pass(heads, torch.bfloat16, lengths, job.k_lens, job.page_size, True, 0)}
    else:
        runs = passes(heads, torch.bfloat16, lengths, lengths, True, 0)
    rows = []
    for name, run in runs.items():
        calls: dict[str, Callable[[], object]] = {
            "triton": captured(lambda run=run: run(False)),
            "specialised": captured(lambda run=run: run(True)),
        }
        if not job.page_size and len(set(lengths)) == 1 and lengths[0] >= 128:
            with suppress(RuntimeError):
                calls["cudnn"] = cudnn(heads, lengths, name)
        work = (backward_flops(lengths, heads) if name == "backward" else job.flops) / 1e9
        tile_rows, steps = job.batch.average_tile()
        row: dict = {"pass": name, "head_dim": heads.dim, "sequences": len(lengths), "longest": max(lengths)}
        row |= {"keys": max(job.k_lens), "page_size": job.page_size, "tile_rows": tile_rows, "steps": steps}
        row |= {f"{kind}_tflops": work / ms for kind, ms in take_turns(calls).items()}
        rows.append(row)
        figures = " ".join(f"{kind} {row[f'{kind}_tflops']:6.0f}" for kind in calls)
        ratio = row["specialised_tflops"] / row["triton_tflops"]
        tiles = f"tiles of {tile_rows:3.0f} x {steps:5.1f}"
        print(f"{name:9s} d{heads.dim:<4d} {job.title}  {tiles}  {ratio:5.2f}  {figures}", flush=True)
    return rows


def cudnn(heads: Heads, lengths: list[int], name: str) -> Callable[[], object]:
    """The same pass by cuDNN; a RuntimeError where it does not take the shape."""
    case = packed_case(lengths, heads)
    if name == "forward":
        stock = stock_forward(case, SDPBackend.CUDNN_ATTENTION)
        stock()
        return captured(stock)
    dout = torch.randn(sum(lengths), heads.queries, heads.value_dim, device="cuda", dtype=torch.bfloat16)
    backward = stock_backward(case, dout, SDPBackend.CUDNN_ATTENTION)
    backward()
    return backward


def compile_job(index: int) -> None:
    """Compile what a kind of heads needs, in a process of a pool."""
    heads, dtype = KINDS[index // 4]
    length, causal = (300, 2500)[index % 2], index // 2 % 2 == 0
    runs = list(passes(heads, dtype, [length], [length], causal, 0).values())
    runs += [paged_pass(heads, dtype, [length], [length], size, causal, 0) for size in PAGE_SIZES]
    for run in runs:
        for specialised in (False, True):
            run(specialised)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    needs_gpu(parser)
    started = time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_job, range(4 * len(KINDS))))
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    record: dict = {**environment(), **compare_bits(args.seconds)}
    print({key: record[key] for key in record if key.endswith(("rows", "different", "batches"))}, flush=True)
    record["speed"] = []
    for job in QUICK if args.quick else (*PACKED, *PAGED):
        record["speed"] += measure(job)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    record["least"] = least_lines(record["speed"])
    print("\n".join(record["least"]))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(int(any(record[key] for key in record if key.endswith("_different"))))


if __name__ == "__main__":
    main()
