"""What one call of attention costs the host, in microseconds, by both families of kernels, on this GPU.

python -m benchmarks.attention.launch_cost [--out launch_cost.json] [--tokens 512]

The forward over packed rows, over pages of 16 and 64, and the backward of one sequence, Qwen3-1.7B heads: by the Triton
kernels and by the warp-specialised ones, repeated as `vexact.ops.kernels.launches` does it, bound by Triton as where a
profiler listens, and the first of a length that has not been seen, which is recorded. The device is idle at the start
of a round, and a time ends when the last kernel is in the stream.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.attention.cases import QWEN3
from benchmarks.attention.specialised_cases import Pass, paged_pass, passes
from benchmarks.shared.clock import environment
from benchmarks.shared.options import at_least_one, needs_gpu, out_file
from vexact.ops.kernels import launches

NAMES = ("forward", "paged 16", "paged 64", "backward")
CALLS, ROUNDS = 20, 50  # few enough calls in a round that none waits for a place in the queue
NEW_LENGTHS = 12


def make(name: str, tokens: int) -> Pass:
    if name.startswith("paged"):
        return paged_pass(QWEN3, torch.bfloat16, [tokens], [tokens], int(name.split()[1]), True, 0)
    return passes(QWEN3, torch.bfloat16, [tokens], [tokens], True, 0)[name]


def host_us(call: Callable[[], object]) -> float:
    """Median microseconds until a call returns."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - started) / CALLS)
    torch.cuda.synchronize()
    return 1e6 * median(times)


@contextmanager
def through_triton() -> Iterator[None]:
    """No launch is repeated."""
    with patch.object(launches, "_observed", lambda: True):
        yield


def first_us(name: str, tokens: int, specialised: bool) -> float:
    """Median microseconds of the first call of each of some lengths."""
    times = []
    for index in range(NEW_LENGTHS):
        run = make(name, tokens + 1 + 2 * index + specialised)
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(specialised)
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return 1e6 * median(times)


def measure(name: str, tokens: int) -> dict[str, float]:
    run = make(name, tokens)
    row = {}
    for family, specialised in (("triton", False), ("specialised", True)):
        run(specialised)
        row[f"{family}_repeated_us"] = host_us(lambda specialised=specialised: run(specialised))
        with through_triton():
            row[f"{family}_bound_us"] = host_us(lambda specialised=specialised: run(specialised))
        row[f"{family}_first_us"] = first_us(name, tokens, specialised)
    return {key: round(value, 1) for key, value in row.items()}


def compile_job(job: tuple[str, int, bool]) -> None:
    """Compile what a call needs, in a process of a pool."""
    name, tokens, specialised = job
    make(name, tokens)(specialised)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--tokens", type=at_least_one, default=512)
    args = parser.parse_args()
    needs_gpu(parser)
    jobs = list(product(NAMES, [args.tokens], (False, True)))
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_job, jobs))
    record: dict = {**environment(), "tokens": args.tokens, "rows": []}
    for name in NAMES:
        row = measure(name, args.tokens)
        record["rows"].append({"pass": name, **row})
        print(
            f"{name:9s} " + "  ".join(f"{key.removesuffix('_us')} {value:.1f}" for key, value in row.items()),
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
