"""Where a decode step's time goes beside the memory roofline, and what each way to launch its kernels gains.

    python -m benchmarks.decode.kernels --out benchmarks/results/decode_kernels_h100.json
    python -m benchmarks.decode.kernels --rows 64 --tune --out tiles.json

A step (Qwen3-1.7B shapes, random weights, no sampling) is captured in a CUDA graph once for every variant of
``vexact/ops/kernels/chain.py``: as it is; kernels that start while the one before them ends, without and with requests
for weights, early or not; SwiGLU in the product of gate and up; the best of these together. Variants take turns. Each
must give the bits of the first for a number of batches of other tokens, so that what is read too early, and is of the
batch before, is seen. Per kind of kernel a trace gives the time from the end of the kernel before it to its own end,
which adds up to the step. The last lines are the table ``STEPS`` that these timings ask for.

``--tune`` searches the tiles of the four products of a layer inside of the step, one product after another, in the best
variant: weights come from memory and neighbours are those of a model, where ``tune_linear.py`` repeats one product.
Exit code 1 if a bit differs. On a CPU (``--shape tiny``) there are no graphs and no trace, and variants do not differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode.step import Step, decode_step, kernels, random_decoder, read_trace
from benchmarks.decode.tiles import search
from benchmarks.rollout.throughput import TINY
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.shared.roofline import HBM_BYTES_PER_S
from vexact.audit.environment import environment
from vexact.device import resolve_device
from vexact.ops.kernels import chain, linear_swiglu
from vexact.ops.kernels.chain import Chain
from vexact.ops.kernels.launches import forget
from vexact.prepare.shapes import SHAPES

MODELS = {"tiny": TINY, "qwen3-1.7b": SHAPES["qwen3-1.7b"], "qwen3-8b": SHAPES["qwen3-8b"]}
VARIANTS = {
    "as it is": Chain(),
    "overlap": Chain(overlap=True),
    "overlap early": Chain(overlap=True, early=True),
    **{f"overlap ask {kib}": Chain(overlap=True, ask=kib) for kib in (64, 128)},
    "overlap early ask 64": Chain(overlap=True, early=True, ask=64),
    **{f"overlap early ask 64 ahead {mib}": Chain(overlap=True, early=True, ask=64, ahead=mib) for mib in (8, 24)},
    "fuse": Chain(fuse=True),
}
BASELINE = next(iter(VARIANTS))
ROUNDS, REPLAYS = 9, 12
TRACED = 6  # replays
WORTH = 0.99  # of the time as it is: a variant that gains less stays off


def use(variant: Chain) -> None:
    chain.STEPS = ((chain.LARGE, variant),)
    forget()


def captured(step: Step, variant: Chain) -> tuple[Callable[[], object], Tensor]:
    """Runs the step in ``variant``, and the logits that this overwrites."""
    use(variant)
    out = step.run()
    if not out.is_cuda:
        out = out.clone()
        return lambda: out.copy_(step.run()), out
    step.run()  # once more as it will be: recorded launches, compiled kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.run()
    return graph.replay, out


def microseconds(call: Callable[[], object], count: int) -> float:
    """Of one call, on average."""
    if torch.cuda.is_available():
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        stop.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(stop) / count
    started = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - started)


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median µs of each, the first round not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(microseconds(call, REPLAYS))
    return {name: median(found[1:]) for name, found in times.items()}


def expected_logits(step: Step, batches: list[Tensor]) -> list[Tensor]:
    """Of each batch, by the step as it is, outside of a graph."""
    use(VARIANTS[BASELINE])
    found = []
    for ids in batches:
        step.ids.copy_(ids)
        found.append(step.run().clone())
    return found


def rows_different(
    step: Step, run: Callable[[], object], out: Tensor, batches: list[Tensor], expected: list[Tensor]
) -> int:
    """Rows of all batches that differ in a bit; NaN, which random weights do not give, is a difference."""
    different = 0
    for ids, logits in zip(batches, expected, strict=True):
        step.ids.copy_(ids)
        run()
        different += int(((out.view(torch.int32) != logits.view(torch.int32)) | logits.isnan()).any(1).sum())
    return different


def trace(step: Step, run: Callable[[], object], fused: bool) -> dict[str, dict[str, float]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(TRACED):
            run()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return read_trace(events, kernels(step, fused=fused), TRACED)


def measure(step: Step, batches: int, rounds: int) -> dict[str, Any]:
    """Every variant of one step; then the fastest overlap together with ``fuse``."""
    generator = torch.Generator(step.ids.device).manual_seed(7)
    vocabulary = step.model.config.vocab_size
    inputs = [
        torch.randint(vocabulary, step.ids.shape, generator=generator, device=step.ids.device) for _ in range(batches)
    ]
    expected = expected_logits(step, inputs)
    runs: dict[str, Callable[[], object]] = {}
    variants, different = dict(VARIANTS), {}

    def add(name: str) -> None:
        runs[name], out = captured(step, variants[name])
        different[name] = rows_different(step, runs[name], out, inputs, expected)
        print(f"  {name}: {different[name]} of {batches * step.rows} rows different", flush=True)

    for name in VARIANTS:
        add(name)
    times = take_turns(runs, max(1, rounds // 3))
    overlap = min((name for name in VARIANTS if name != "fuse"), key=times.__getitem__)
    if variants[overlap].overlap:
        variants["together"] = replace(variants[overlap], fuse=True)
        add("together")
    times = take_turns(runs, rounds)
    read = sum(kernel.read for kernel in kernels(step, fused=False))
    floor = 1e6 * read / HBM_BYTES_PER_S
    best = min(times, key=times.__getitem__)
    best = best if times[best] < WORTH * times[BASELINE] else BASELINE
    result = {
        "rows": step.rows,
        "keys": step.keys,
        "floor_us": floor,
        "rows_compared": batches * step.rows,
        "best": best,
        "chain": asdict(variants[best]),
        "variants": {
            name: {"us": us, "of_roofline": floor / us, "rows_different": different[name]} for name, us in times.items()
        },
    }
    show_times(result)
    if step.ids.is_cuda:
        may_fuse = step.rows <= linear_swiglu.TILES[-1][0]
        try:
            result["kernels"] = {
                name: trace(step, runs[name], variants[name].fuse and may_fuse)
                for name in dict.fromkeys((BASELINE, "fuse", best))
            }
        except ValueError as error:  # the times stand all the same
            result["no_trace"] = str(error)
    return result


def show_times(result: dict[str, Any]) -> None:
    print(f"{result['rows']} sequences of {result['keys']} keys, floor {result['floor_us']:.0f} us")
    slow = result["variants"][BASELINE]["us"]
    for name, row in result["variants"].items():
        print(f"  {name:24} {row['us']:8.1f} us  {slow / row['us']:6.3f}x  {row['of_roofline']:6.1%} of the roofline")
    sys.stdout.flush()


def show_kernels(result: dict[str, Any]) -> None:
    if "no_trace" in result:
        print(f"  no times of single kernels: {result['no_trace']}")
    for name, kinds in result.get("kernels", {}).items():
        print(f"  {name}: us per launch, us that it runs, share of {HBM_BYTES_PER_S / 1e12} TB/s, us a step")
        for kind, row in kinds.items():
            share = row["bytes"] / HBM_BYTES_PER_S * 1e6 / row["us"]
            total = row["us"] * row["launches"]
            print(f"    {kind:10} {row['us']:7.2f} {row['ran_us']:7.2f} {share:6.1%} {total:8.1f}")
    sys.stdout.flush()


def table(results: list[dict[str, Any]]) -> str:
    """``STEPS`` as these results ask for."""
    entries = []
    for result in results:
        fields = ", ".join(f"{key}={value}" for key, value in result["chain"].items() if value)
        entries.append(f"    ({result['rows']}, Chain({fields})),")
    return "\n".join(["STEPS: tuple[tuple[int, Chain], ...] = (", *entries, "    (LARGE, Chain()),", ")"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="qwen3-1.7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--rows", type=at_least_one, nargs="+", default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--keys", type=at_least_one, default=768, help="of a sequence: at most 2048, one chunk")
    parser.add_argument("--layers", type=at_least_one, default=None, help="default: all of the shape")
    parser.add_argument("--batches", type=at_least_one, default=16, help="of other tokens, whose bits are compared")
    parser.add_argument("--rounds", type=at_least_one, default=ROUNDS)
    parser.add_argument("--tune", action="store_true", help="search tiles of the products inside of the step")
    parser.add_argument("--budget-s", type=at_least_one, default=480, help="--tune: no new candidate after this")
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    if arguments.keys > 2048:
        parser.error(f"--keys {arguments.keys} is more than one chunk of 2048; name fewer")
    device = torch.device(resolve_device("auto"))
    raw = MODELS[arguments.shape]
    model = random_decoder(raw, arguments.layers or raw["num_hidden_layers"], device)
    record: dict[str, Any] = {"environment": environment(device), "shape": arguments.shape, "results": []}
    deadline = time.monotonic() + arguments.budget_s
    for rows in sorted(set(arguments.rows)):
        step = decode_step(model, rows, arguments.keys)
        result = measure(step, arguments.batches, arguments.rounds)
        show_kernels(result)
        if arguments.tune:
            found = Chain(**result["chain"])
            use(found)
            result["tiles"] = search(
                step, found.fuse, lambda s=step, c=found: captured(s, c)[0], microseconds, deadline
            )
        record["results"].append(result)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["results"]))
    wrong = sum(row["rows_different"] for result in record["results"] for row in result["variants"].values())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
