"""The warp-specialised attention of sm_90 beside the Triton kernels: bits, then speed, on this GPU.

python -m benchmarks.attention.specialised [--out specialised.json] [--seconds 40] [--quick]

Bits: forward and backward of random batches (long, short and empty sequences, more and fewer keys than queries, causal
and not, three kinds of heads) until --seconds are over; every row of out, lse, dq, dk and dv is compared. Speed: both
families and cuDNN take turns, so that a clock that falls hits all alike, in CUDA graphs, but for cuDNN's backward,
which autograd calls; --quick: four rows.
Exit code 1 if one bit differs. "launch.PROVEN" names the passes that take these kernels unasked.
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

from benchmarks.attention.cases import (
    QWEN3,
    Heads,
    backward_flops,
    cumulative,
    forward_flops,
    packed_case,
    stock_backward,
    stock_forward,
)
from benchmarks.shared.clock import environment
from benchmarks.shared.options import needs_gpu, out_file
from vexact.ops.kernels.attention import packed_backward, packed_forward

D64 = Heads(16, 8, 64, 64)
KINDS = ((QWEN3, torch.bfloat16), (D64, torch.bfloat16), (Heads(4, 4, 128, 128), torch.float16))
LENGTHS = (
    *((QWEN3, [length] * (16384 // length)) for length in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)),
    (QWEN3, [32768]),
    (QWEN3, [512] * 2),
    (QWEN3, [1 + 37 * index % 60 for index in range(500)]),
    (QWEN3, [8000, *(1 + 37 * index % 60 for index in range(200))]),
    *((D64, [length] * (16384 // length)) for length in (64, 512, 1024, 8192)),
)
QUICK = ((QWEN3, [8192] * 2), (QWEN3, [1024] * 16), (QWEN3, [64] * 256), (D64, [8192] * 2))
Pass = Callable[[bool | None], tuple[Tensor, ...]]


def passes(
    heads: Heads, dtype: torch.dtype, q_lens: list[int], k_lens: list[int], causal: bool, seed: int
) -> tuple[Pass, Pass]:
    """Forward and backward of one batch, by `specialised`."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(rows: int, count: int, dim: int) -> Tensor:
        return torch.randn(rows, count, dim, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    q, dout = (draw(sum(q_lens), heads.queries, heads.dim) for _ in range(2))
    k, v = (draw(sum(k_lens), heads.keys, heads.dim) for _ in range(2))
    rest = (cumulative(q_lens), cumulative(k_lens), max(q_lens), max(k_lens), heads.dim**-0.5, causal)

    def forward(specialised: bool | None) -> tuple[Tensor, ...]:
        return packed_forward(q, k, v, *rest, specialised=specialised)

    out, lse = forward(False)

    def backward(specialised: bool | None) -> tuple[Tensor, ...]:
        return packed_backward(dout, q, k, v, out, lse, *rest, specialised=specialised)

    return forward, backward


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
    found = {"forward_rows": 0, "forward_different": 0, "backward_rows": 0, "backward_different": 0, "batches": 0}
    rng = random.Random(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        heads, dtype = KINDS[found["batches"] % len(KINDS)]
        both = passes(heads, dtype, *random_lengths(rng), rng.random() < 0.8, found["batches"])
        for name, run in zip(("forward", "backward"), both, strict=True):
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


def measure(heads: Heads, lengths: list[int]) -> list[dict]:
    case = packed_case(lengths, heads)
    forward, backward = passes(heads, torch.bfloat16, lengths, lengths, True, 0)
    dout = torch.randn(sum(lengths), heads.queries, heads.value_dim, device="cuda", dtype=torch.bfloat16)
    rows = []
    for name, run, flops in (("forward", forward, forward_flops), ("backward", backward, backward_flops)):
        calls: dict[str, Callable[[], object]] = {
            "triton": captured(lambda run=run: run(False)),
            "specialised": captured(lambda run=run: run(True)),
        }
        if len(set(lengths)) == 1 and lengths[0] >= 128:
            with suppress(RuntimeError):
                peer = SDPBackend.CUDNN_ATTENTION
                stock = stock_forward(case, peer) if name == "forward" else stock_backward(case, dout, peer)
                stock()
                calls["cudnn"] = captured(stock) if name == "forward" else stock
        work = flops(lengths, heads) / 1e9
        row: dict = {"pass": name, "head_dim": heads.dim, "sequences": len(lengths), "longest": max(lengths)}
        row |= {f"{kind}_tflops": work / ms for kind, ms in take_turns(calls).items()}
        rows.append(row)
        figures = " ".join(f"{kind} {row[f'{kind}_tflops']:6.0f}" for kind in calls if f"{kind}_tflops" in row)
        print(f"{name:9s} d{heads.dim:<4d} {len(lengths):4d} x <= {max(lengths):6d}  {figures}", flush=True)
    return rows


def compile_job(index: int) -> None:
    heads, dtype = KINDS[index // 4]
    length, causal = (300, 2500)[index % 2], index // 2 % 2 == 0
    for run in passes(heads, dtype, [length], [length], causal, 0):
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
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 12), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_job, range(4 * len(KINDS))))
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    record: dict = {**environment(), **compare_bits(args.seconds)}
    print({key: record[key] for key in record if key.endswith(("rows", "different", "batches"))}, flush=True)
    record["speed"] = [row for job in (QUICK if args.quick else LENGTHS) for row in measure(*job)]
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(record["forward_different"] or record["backward_different"]))


if __name__ == "__main__":
    main()
