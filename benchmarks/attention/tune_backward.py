"""Compare and measure the launch configurations of the warp-specialised backward on this GPU.

python -m benchmarks.attention.tune_backward [--out backward.json] [--seconds 480] [--kinds queries] [--dims 128,64]

A candidate is one of the two kernels (dQ, or dK and dV) for one kind of head. It has the bits of the Triton kernels in
every row of every batch of `BATCHES`, or it is not measured; then its speed is, in TFLOP/s of the products it needs. A
barrier that is wrong never opens, so a process of its own runs the candidates: one that does not answer within 45
seconds costs that process, and the next candidate gets a new one. In the end the fastest of both kernels, the tables'
choice, the Triton backward and cuDNN's take turns. Exit code 1 if a bit differed, or a candidate failed or hung.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.attention.backward_walks import CANDIDATES
from benchmarks.attention.cases import (
    MOONLIGHT,
    QWEN3,
    Heads,
    backward_flops,
    cumulative,
    forward_flops,
    packed_case,
    stock_backward,
)
from benchmarks.attention.specialised import captured, rows_different, take_turns
from benchmarks.shared.clock import environment
from benchmarks.shared.hang_safe import Worker
from benchmarks.shared.options import needs_gpu, out_file
from vexact.ops.kernels.attention import packed_backward, packed_forward
from vexact.ops.kernels.attention.backward import prepare_kernel
from vexact.ops.kernels.attention.hopper.backward import host
from vexact.ops.kernels.attention.hopper.backward.host import KEYS, QUERIES, Inputs, Walk, launch_keys, launch_queries
from vexact.ops.kernels.attention.launch import exponent_scale, form, padded
from vexact.ops.kernels.attention.packed import PREPARE_ROWS
from vexact.ops.kernels.sizes import cdiv

HEADS = {128: QWEN3, 64: Heads(16, 8, 64, 64), 192: MOONLIGHT}
DEVICE, DTYPE = "cuda", torch.bfloat16
KERNELS = {"queries_kernel": host.queries_kernel, "keys_kernel": host.keys_kernel}
TIMED = [8192, 8192]
ODD = [300, 64, 1, 0, 65, 127, 700, 128, 63, 129, 191, 193, 2049]
# Query and key lengths, and whether the mask is causal.
BATCHES = (
    (ODD, ODD, True), (ODD, ODD, False), (ODD, [length + 77 for length in ODD], True),
    ([length + 50 for length in ODD], [length % 150 for length in ODD], True), (TIMED, TIMED, True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    kind: str
    dim: int
    walk: Walk


@dataclass(slots=True)
class Case:
    """A batch, its statistics and the gradients of the Triton kernels."""

    inputs: Inputs
    dout: Tensor
    out: Tensor
    lse: Tensor
    longest: tuple[int, int]
    expected: tuple[Tensor, Tensor, Tensor]

    def packed(self, specialised: bool) -> tuple[Tensor, Tensor, Tensor]:
        x = self.inputs
        rest = (x.cu_seqlens_q, x.cu_seqlens_k, *self.longest, x.softmax_scale, x.causal)
        return packed_backward(self.dout, x.q, x.k, x.v, self.out, self.lse, *rest, specialised=specialised)

    def run(self, kind: str, walk: Walk) -> tuple[Tensor, ...]:
        x = self.inputs
        if kind == "queries":
            dq = torch.empty_like(x.q)
            launch_queries(x, dq, walk)
            return (dq,)
        dk, dv = torch.empty_like(x.k), torch.empty_like(x.v)
        launch_keys(x, dk, dv, walk)
        return dk, dv


def make_case(dim: int, q_lens: list[int], k_lens: list[int], causal: bool) -> Case:
    heads = HEADS[dim]
    generator = torch.Generator(DEVICE).manual_seed(dim + len(q_lens))

    def draw(rows: int, count: int, width: int) -> Tensor:
        return torch.randn(rows, count, width, generator=generator, device=DEVICE).to(DTYPE)

    q, k = draw(sum(q_lens), heads.queries, dim), draw(sum(k_lens), heads.keys, dim)
    v, dout = draw(sum(k_lens), heads.keys, heads.value_dim), draw(sum(q_lens), heads.queries, heads.value_dim)
    longest, scale = (max(q_lens), max(k_lens)), dim**-0.5
    cu_q, cu_k = cumulative(q_lens, DEVICE), cumulative(k_lens, DEVICE)
    out, lse = packed_forward(q, k, v, cu_q, cu_k, *longest, scale, causal, specialised=False)
    delta = torch.empty((heads.queries, q.shape[0]), device=DEVICE)
    lse2 = torch.empty_like(delta)
    prepare_kernel[cdiv(q.shape[0], PREPARE_ROWS) * heads.queries,](
        dout, out, lse, delta, lse2, q.shape[0], NUM_HEADS=heads.queries, DV=heads.value_dim,
        DV_PAD=padded(heads.value_dim), ROWS=PREPARE_ROWS, num_warps=4,
    )  # fmt: skip
    inputs = Inputs(form(q, k, v), dout, q, k, v, delta, lse2, cu_q, cu_k, exponent_scale(scale), scale, causal)
    case = Case(inputs, dout, out, lse, longest, (q, k, v))
    case.expected = case.packed(False)
    return case


def kernel_flops(candidate: Candidate) -> float:
    """Of the products one kernel needs: three for dQ, four for dK and dV, two of them the scores and dP again."""
    heads = HEADS[candidate.dim]
    widths = (2 * heads.dim + heads.value_dim) if candidate.kind == "queries" else 2 * (heads.dim + heads.value_dim)
    return forward_flops(TIMED, heads) * widths / (heads.dim + heads.value_dim)


def try_candidate(candidate: Candidate, cases: list[Case]) -> dict[str, Any]:
    compared = different = 0
    for case in cases:
        expected = case.expected[:1] if candidate.kind == "queries" else case.expected[1:]
        for _ in range(2):
            counts = rows_different(case.run(candidate.kind, candidate.walk), expected)
            compared, different = compared + counts[0], different + counts[1]
    found: dict[str, Any] = {"rows": compared, "different": different}
    if not different:
        call = captured(lambda: cases[-1].run(candidate.kind, candidate.walk))
        found["ms"] = take_turns({"call": call})["call"]
        found["tflops"] = kernel_flops(candidate) / found["ms"] / 1e9
    return found


def compare_whole(dim: int, queries: Walk, keys: Walk, cases: list[Case]) -> dict[str, Any]:
    """TFLOP/s of whole backward passes that take turns; the first two with the time of the statistics left out."""
    case, heads = cases[-1], HEADS[dim]
    chosen = QUERIES[dim, heads.value_dim], KEYS[dim, heads.value_dim]

    def both(pair: tuple[Walk, Walk]) -> None:
        case.run("queries", pair[0])
        case.run("keys", pair[1])

    calls: dict[str, Callable[[], object]] = {
        "fastest": captured(lambda: both((queries, keys))),
        "chosen": captured(lambda: both(chosen)),
        "specialised": captured(lambda: case.packed(True)),
        "triton": captured(lambda: case.packed(False)),
    }
    with suppress(RuntimeError):
        dout = torch.randn(sum(TIMED), heads.queries, heads.value_dim, device=DEVICE, dtype=DTYPE)
        stock = stock_backward(packed_case(TIMED, heads), dout, SDPBackend.CUDNN_ATTENTION)
        stock()
        calls["cudnn"] = stock
    work = backward_flops(TIMED, heads) / 1e9
    return {f"{name}_tflops": work / ms for name, ms in take_turns(calls).items()}


class Bench:
    """What a worker process holds: the batches of one dimension at a time."""

    def __init__(self) -> None:
        self.dim, self.cases = 0, list[Case]()

    def __call__(self, job: Candidate | tuple[int, Walk, Walk]) -> dict[str, Any]:
        dim = job.dim if isinstance(job, Candidate) else job[0]
        if dim != self.dim:
            self.dim, self.cases = dim, [make_case(dim, *batch) for batch in BATCHES]
        return try_candidate(job, self.cases) if isinstance(job, Candidate) else compare_whole(*job, self.cases)


def compile_only(candidate: Candidate) -> None:
    """Fill the compiler's cache without running a candidate."""
    for name, kernel in KERNELS.items():
        setattr(host, name, Compiled(kernel))
    for batch in BATCHES[:3]:
        make_case(candidate.dim, *batch).run(candidate.kind, candidate.walk)


class Compiled:
    """Stands for a kernel that is compiled and not launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.kernel.warmup(*arguments, grid=grid, **constants)


def candidates(kinds: list[str], dims: list[int]) -> Iterator[Candidate]:
    for dim in dims:
        for kind in kinds:
            yield from (Candidate(kind, dim, walk) for walk in CANDIDATES[kind, dim])


def fastest(results: list[dict[str, Any]], kind: str, dim: int) -> Walk | None:
    known = [row for row in results if row["kind"] == kind and row["dim"] == dim and "ms" in row]
    return Walk(**min(known, key=lambda row: row["ms"])["walk"]) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--kinds", default="queries,keys")
    parser.add_argument("--dims", default="128,64,192")
    args = parser.parse_args()
    kinds, dims = args.kinds.split(","), [int(dim) for dim in args.dims.split(",")]
    if not {*kinds} <= {"queries", "keys"} or not {*dims} <= {*HEADS}:
        parser.error("--kinds takes queries and keys, --dims 128, 64 and 192, with commas between")
    needs_gpu(parser)
    started = time.monotonic()
    todo = list(candidates(kinds, dims))
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 12), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_only, todo))
    print(f"{len(todo)} candidates compiled in {time.monotonic() - started:.0f} s", flush=True)
    record: dict[str, Any] = {**environment(), "results": [], "whole": []}
    worker = Worker(Bench)
    for candidate in todo:
        if time.monotonic() - started > args.seconds:
            print("out of time", flush=True)
            break
        found = {**asdict(candidate), **worker.ask(candidate)}
        record["results"].append(found)
        print(json.dumps(found), flush=True)
    for dim in dims:
        best = [fastest(record["results"], kind, dim) for kind in ("queries", "keys")]
        if all(best) and time.monotonic() - started < args.seconds:
            found = {"dim": dim, **worker.ask((dim, *best))}
            record["whole"].append(found)
            print(json.dumps(found), flush=True)
    worker.stop()
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(int(any(row.get("different") or "error" in row for row in (*record["results"], *record["whole"]))))


if __name__ == "__main__":
    main()
