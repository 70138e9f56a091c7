"""What launching steps ahead gains: tokens per second, and how long no kernel runs between two decode steps.

    python -m benchmarks.rollout.async_scheduling --out benchmarks/results/async_scheduling_h100.json

Qwen3-1.7B shapes with random weights, 512 prompt tokens and 512 new ones. One engine, hence the same graphs and the
same memory, runs step by step and ahead in turn, and the tokens of both must be the same. The time between steps is
that from the end of a step's last kernel to the start of the next one's first, copies to and from the host included, in
a trace of ``torch.profiler``. ``--mixed N`` adds the workload of ``serving.py``: N requests at once, on as many slots
as the most sequences. ``--shape tiny`` is for a CPU, where there is no trace.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout.serving_load import Load, draw
from benchmarks.rollout.throughput import ROOM, TINY
from benchmarks.shared.options import at_least_one, none_or_more, out_file
from benchmarks.shared.roofline import BYTES, Traffic
from vexact.audit.environment import environment
from vexact.device import resolve_device
from vexact.models import ModelConfig, random_model
from vexact.prepare.shapes import SHAPES
from vexact.rollout import Engine, SamplingParams

CASES = {"tiny": (TINY, 24, 16), "qwen3-1.7b": (SHAPES["qwen3-1.7b"], 512, 512)}
"""Configuration, prompt tokens, new tokens."""
MODES = {"step by step": False, "ahead": True}
TRACED_STEPS = 24


def generate(engine: Engine, loads: list[Load]) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds, and the tokens."""
    params = [SamplingParams(max_tokens=load.max_tokens, ignore_eos=True) for load in loads]
    started = time.perf_counter()
    samples = engine.generate([load.prompt for load in loads], params, [str(index) for index in range(len(loads))])
    return time.perf_counter() - started, [sample.token_ids for sample in samples]


def between_steps(engine: Engine, loads: list[Load]) -> dict[str, float]:
    """Of decode steps in the middle: µs per step, µs without a kernel between two, and shares of the time."""
    for load in loads:
        engine.add_request(load.prompt, SamplingParams(max_tokens=load.max_tokens, ignore_eos=True))
    while engine.num_requests[1] or engine.stats()["rollout/graph_ratio"] < 1:
        engine.step()
    for _ in range(TRACED_STEPS):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(TRACED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    engine.abort_all()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return gaps(events)


def gaps(events: list[dict[str, Any]]) -> dict[str, float]:
    """From a trace: every step begins with one copy to the device."""
    kernels = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel")
    uploads = sorted(e["ts"] for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"])
    between = []
    for upload in uploads[1:]:
        before = [end for start, end in kernels if start < upload]
        after = [start for start, _ in kernels if start >= upload]
        if before and after:
            between.append(after[0] - max(before))
    first, last = uploads[0], max(end for _, end in kernels)
    busy, reached = 0.0, first
    for start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    steps = len(uploads)
    return {
        "step_us": round((last - first) / steps, 1),
        "between_steps_us": round(statistics.median(between), 1),
        "between_steps_share": round(sum(between) / (last - first), 4),
        "kernels_share": round(busy / (last - first), 4),
    }


def fixed(count: int, vocab_size: int, prompt_tokens: int, new: int) -> list[Load]:
    """Requests of one size."""
    rng = random.Random(count)
    return [Load([rng.randrange(vocab_size) for _ in range(prompt_tokens)], new) for _ in range(count)]


def measure(engine: Engine, loads: list[Load], repeats: int, *, traced: bool) -> dict[str, Any]:
    """Both modes in turn, ``repeats`` times after one that is not counted."""
    rows: dict[str, Any] = {name: {"seconds": []} for name in MODES}
    tokens = []
    for repeat in range(repeats + 1):
        for name, ahead in MODES.items():
            engine._stepper.runs_ahead = ahead
            engine.stats()
            seconds, found = generate(engine, loads)
            tokens.append(found)
            stats = engine.stats()
            if repeat:
                rows[name]["seconds"].append(round(seconds, 4))
                rows[name] |= {key.removeprefix("rollout/"): round(value, 4) for key, value in stats.items()}
    for name, ahead in MODES.items():
        engine._stepper.runs_ahead = ahead
        rows[name]["out_tok_per_s"] = round(sum(map(len, tokens[0])) / statistics.median(rows[name]["seconds"]), 1)
        if traced:
            rows[name] |= between_steps(engine, loads)
    return rows | {"tokens_equal": all(found == tokens[0] for found in tokens)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CASES, default="qwen3-1.7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--sequences", type=at_least_one, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--mixed", type=none_or_more, default=0, metavar="N")
    parser.add_argument("--repeats", type=at_least_one, default=2)
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    raw, *lengths = CASES[arguments.shape]
    device = torch.device(resolve_device("auto"))
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = random_model(ModelConfig.from_hf_dict(raw), 0, getattr(torch, dtype), device)
    most = max(arguments.sequences)
    per_key = Traffic.of(raw).per_key // BYTES * getattr(torch, dtype).itemsize
    engine = Engine(
        model=model,
        max_model_len=2 * sum(lengths),  # a mixed request has up to 512 + 1,024 tokens
        max_num_seqs=most,
        enable_prefix_caching=False,
        kv_cache_bytes=int(ROOM * most * sum(lengths) * per_key),
    )
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(device),
        "shape": arguments.shape,
        "prompt_tokens": lengths[0],
        "new_tokens": lengths[1],
        "rows": {},
    }
    work = {str(count): fixed(count, raw["vocab_size"], *lengths) for count in arguments.sequences}
    if arguments.mixed:
        work["mixed"] = draw(arguments.mixed, raw["vocab_size"], seed=0, scale=sum(lengths) / 1024)
    for what, loads in work.items():
        traced = device.type == "cuda" and what != "mixed"
        rows = record["rows"][what] = measure(engine, loads, arguments.repeats, traced=traced)
        for name in MODES:
            shown = {key: value for key, value in rows[name].items() if key != "seconds"}
            print(f"{what:>5} {name:>12}: {json.dumps(shown)}", flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(rows["tokens_equal"] for rows in record["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
