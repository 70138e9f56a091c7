"""A fixed batch: tokens per second of n sequences at once beside the memory roofline, and what exactness costs.

    python -m benchmarks.rollout.throughput --out benchmarks/results/rollout_h100.json
    python -m benchmarks.rollout.throughput --shape qwen3-8b --sequences 1 64 128
    python -m benchmarks.rollout.throughput --sides exact --busy 64       # how long the GPU idles between steps

All sides load the same checkpoint with random weights, get the same prompts (512 tokens, 512 new ones), sample at
temperature 1 without an end of sequence and, but for ``hf``, report log-probabilities; prefix caches are off, key-value
caches equally large. One process after another has the device to itself.

* ``exact``: our engine as it is; ``exact-eager`` without CUDA graphs, whose steps take as long as the host does.
* ``stock``: ``batch_invariant=False``: cuBLAS, pointwise operators fused by torch's compiler, CUDA graphs, and the
  attention that its line names: on torch 2.11 without the package flash_attn that is this project's.
* ``hf``: transformers' ``generate`` with sdpa, for at most ``--hf_most`` sequences, once.
* ``vllm``, ``vllm-invariant`` (VLLM_BATCH_INVARIANT=1): where vLLM is installed.

A repeat is one batch from the first prompt token to the last sampled one; a shorter batch before it is not counted, and
another of one token each tells prefill from decoding. The exactness tax is the time of ``exact`` over that of
``stock``, less 1. The roofline (roofline.py) lets prefill be free. ``--shape tiny`` is for a CPU, where no figure means
a thing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rollout.sides import ENVIRONMENT, SIDES, Batch, Side
from benchmarks.shared.clock import covered, machine
from benchmarks.shared.options import at_least_one, checkpoint, none_or_more, out_file
from benchmarks.shared.roofline import BYTES, Traffic
from benchmarks.trainer.end_to_end import random_checkpoint
from benchmarks.trainer.grpo_run import SHAPES as RUNS
from vexact.device import resolve_device
from vexact.models import load_model
from vexact.prepare.shapes import SHAPES as CHECKPOINTS
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores

TINY = RUNS["tiny"].raw | {"head_dim": 32}  # vLLM has no narrower heads on a CPU
SHAPES = {name: run.raw for name, run in RUNS.items()} | {"qwen3-0.6b": CHECKPOINTS["qwen3-0.6b"], "tiny": TINY}
"""config.json; of the mixtures of experts few layers, so that a GPU holds them with room for keys."""
SCORED = 8  # sequences whose log-probabilities are compared with the training forward's
WARM = 16  # new tokens of the batch that is not counted
ROOM = 1.1  # of the key-value cache, for pages that are not full


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.side is not None:  # one side, in this process
        arguments.out.write_text(json.dumps(run_side(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        if arguments.model is None:
            raw = SHAPES[arguments.shape] | {"eos_token_id": 1, "rope_theta": 1e6}
            arguments.model = random_checkpoint(raw, Path(work) / "model")
        return compare(arguments, Path(work))


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, tiny = parser.add_argument, not torch.cuda.is_available()
    add("--shape", choices=SHAPES, default="tiny" if tiny else "qwen3-1.7b")
    add("--sequences", type=at_least_one, nargs="+", default=[1, 8] if tiny else [1, 8, 64, 256])
    add("--prompt_tokens", type=at_least_one, default=24 if tiny else 512)
    add("--new_tokens", type=at_least_one, default=16 if tiny else 512)
    add("--sides", nargs="+", choices=SIDES, default=["exact", "stock", "hf", "vllm"])
    add("--repeats", type=at_least_one, default=2)
    add("--hf_most", type=none_or_more, default=8)
    add("--busy", type=at_least_one, nargs="*", default=[], help="sequences at which ours are profiled as well")
    add("--model", type=checkpoint, help="a checkpoint of that shape; by default one with random weights")
    add("--out", type=out_file)
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def dtype() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one side took, by number of sequences, and samples to compare."""
    raw = json.loads((arguments.model / "config.json").read_text())
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    sizes = [n for n in arguments.sequences if arguments.side != "hf" or n <= arguments.hf_most]
    most = max(sizes, default=1)
    per_key = Traffic.of(raw).per_key // BYTES * getattr(torch, dtype()).itemsize
    limits = {
        "max_model_len": prompt + new,
        "max_num_seqs": most,
        "max_num_batched_tokens": max(8192 if torch.cuda.is_available() else 256, most),
        "enable_prefix_caching": False,
        "kv_cache_bytes": int(ROOM * most * (prompt + new) * per_key),
    }
    side = SIDES[arguments.side](arguments.model, limits, dtype())
    found: dict[str, Any] = {"version": side.version, "attention": side.attention, "limits": limits, "rows": {}}
    repeats = 1 if arguments.side == "hf" else arguments.repeats
    for count in sizes:
        draw = random.Random(count)
        prompts = [[draw.randrange(raw["vocab_size"]) for _ in range(prompt)] for _ in range(count)]
        row, batch = measure(side, prompts, new, repeats)
        if count in arguments.busy and arguments.side in ("exact", "stock") and torch.cuda.is_available():
            row |= busy(side, prompts, new, row["decode_step_ms"])
        found["rows"][count] = row
        if batch[0][1]:
            found |= {"prompts": prompts[:SCORED], "samples": batch[:SCORED]}
    return found


def measure(side: Side, prompts: list[list[int]], new: int, repeats: int) -> tuple[dict[str, Any], Batch]:
    """Medians of the seconds of a batch, and the last one."""
    _, batch = timed(side, prompts, min(WARM, new))
    wholes, firsts = [], []
    for _ in range(repeats):
        firsts.append(timed(side, prompts, 1)[0])
        seconds, batch = timed(side, prompts, new)
        wholes.append(seconds)
    whole, first = statistics.median(wholes), statistics.median(firsts)
    step = max(whole - first, 1e-9) / max(1, new - 1)
    row = {
        "seconds": round(whole, 4),
        "fastest_slowest_s": [round(min(wholes), 4), round(max(wholes), 4)],
        "tokens_per_s": round(len(prompts) * new / whole, 1),
        "prefill_s": round(first, 4),
        "decode_step_ms": round(1e3 * step, 3),
    }
    return row, batch


def timed(side: Side, prompts: list[list[int]], tokens: int) -> tuple[float, Batch]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    batch = side.generate(prompts, tokens)
    seconds = time.perf_counter() - started
    assert [len(ids) for ids, _ in batch] == [tokens] * len(prompts)
    return seconds, batch


def busy(side: Side, prompts: list[list[int]], new: int, step_ms: float) -> dict[str, float]:
    """How long a decode step keeps the GPU busy, in a profile, and the share of a step, without one, that it idles."""
    kernels_ms = (kernel_ms(side, prompts, new) - kernel_ms(side, prompts, 1)) / (new - 1)
    return {"gpu_busy_step_ms": round(kernels_ms, 4), "idle_share": round(1 - kernels_ms / step_ms, 4)}


def kernel_ms(side: Side, prompts: list[list[int]], tokens: int) -> float:
    """Milliseconds in which at least one kernel or copy ran."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        timed(side, prompts, tokens)
    ranges = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
    ]
    return 1e-3 * covered(ranges)


def compare(arguments: argparse.Namespace, work: Path) -> int:
    """Runs the sides, prints the table and keeps the record, also of those that ran when another could not."""
    raw = json.loads((arguments.model / "config.json").read_text())
    traffic, lengths = Traffic.of(raw), (arguments.prompt_tokens, arguments.new_tokens)
    record: dict[str, Any] = machine() | {
        "shape": arguments.shape,
        "layers": raw["num_hidden_layers"],
        "dtype": dtype(),
        "prompt_tokens": lengths[0],
        "new_tokens": lengths[1],
        "repeats": arguments.repeats,
        "not_run": [],
        "roofline": {str(n): bound(traffic, n, lengths) for n in arguments.sequences},
        "sides": {},
    }
    for name in arguments.sides:
        result = started(arguments, name, work)
        if result is None:
            record["not_run"].append(name)
            continue
        if "samples" in result:
            prompts, samples = result.pop("prompts"), result.pop("samples")
            if name != "stock":
                result["against_training"] = score(arguments.model, prompts, samples)
        record["sides"][name] = result
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(record | taxes(record), indent=1) + "\n")
    print(table(record))
    return 1 if record["not_run"] else 0


def bound(traffic: Traffic, sequences: int, lengths: tuple[int, int]) -> dict[str, float]:
    mean_keys = lengths[0] + (lengths[1] - 1) / 2
    return {
        "weights_gib_per_step": round(traffic.weights(sequences) / 2**30, 3),
        "keys_gib_per_step": round(sequences * mean_keys * traffic.per_key / 2**30, 3),
        "tokens_per_s": round(traffic.tokens_per_s([lengths] * sequences, sequences), 1),
    }


def started(arguments: argparse.Namespace, side: str, work: Path) -> dict[str, Any] | None:
    """What a side's process wrote; None, after its error, if it failed."""
    print(f"{side} …", file=sys.stderr, flush=True)
    out = work / f"{side}.json"
    command = [sys.executable, "-m", "benchmarks.rollout.throughput"]
    command += ["--side", side, "--model", str(arguments.model), "--out", str(out)]
    for name in ("shape", "prompt_tokens", "new_tokens", "repeats", "hf_most"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--sequences", *map(str, arguments.sequences), "--busy", *map(str, arguments.busy)]
    done = subprocess.run(command, env=ENVIRONMENT.get(side, {}) | os.environ, check=False)
    if done.returncode:
        print(f"{side} ended with exit code {done.returncode}", file=sys.stderr)
        return None
    return dict(json.loads(out.read_text()))


def score(model: Path, prompts: list[list[int]], samples: Batch) -> dict[str, Any]:
    """How far the log-probabilities of samples are from the training forward's."""
    device = torch.device(resolve_device("auto"))
    trained = load_model(model, dtype=getattr(torch, dtype()), device=device)
    sequences = [TokenSequence(prompt, ids) for prompt, (ids, _) in zip(prompts, samples, strict=True)]
    with torch.no_grad():
        expected = token_scores(trained, pack_tokens(sequences, device)).logprobs.cpu().numpy()
    given = np.concatenate([np.array(logprobs, np.float32) for _, logprobs in samples])
    return {
        "log_probs_compared": len(expected),
        "log_probs_different": int((expected.view(np.int32) != given.view(np.int32)).sum()),
        "max_log_prob_diff": float(np.abs(expected - given).max()),
        "max_prob_diff": float(np.abs(np.exp(expected) - np.exp(given)).max()),
    }


def taxes(record: dict[str, Any]) -> dict[str, Any]:
    """The exactness tax, by number of sequences."""
    exact, stock = (record["sides"].get(name, {"rows": {}})["rows"] for name in ("exact", "stock"))
    both = [count for count in exact if count in stock]
    return {"exactness_tax": {n: round(exact[n]["seconds"] / stock[n]["seconds"] - 1, 4) for n in both}}


def table(record: dict[str, Any]) -> str:
    """Tokens per second and the share of the roofline, by number of sequences and side; then what is to be said."""
    sides, on_gpu = record["sides"], record["gpu"] is not None
    lines = [f"{'sequences':>9}  {'roofline, tok/s':>16}" + "".join(f"  {name:>20}" for name in sides)]
    for count, limit in record["roofline"].items():
        cells = []
        for side in sides.values():
            row = side["rows"].get(count)
            share = f" ({row['tokens_per_s'] / limit['tokens_per_s']:.0%})" if row and on_gpu else ""
            cells.append(f"{row['tokens_per_s']:.1f}{share}" if row else "-")
        lines.append(f"{count:>9}  {limit['tokens_per_s']:>16.1f}" + "".join(f"  {cell:>20}" for cell in cells))
    for count, limit in record["roofline"].items():
        gib = f"{limit['weights_gib_per_step']:.3f} GiB of weights + {limit['keys_gib_per_step']:.3f} GiB of keys"
        lines.append(f"a step of {count}: {gib} and values at 3.0 TB/s")
    for count, tax in taxes(record)["exactness_tax"].items():
        lines.append(f"exactness tax at {count}: {tax:+.1%} of stock's time")
    for name, side in sides.items():
        lines.append(f"{name}: {side['version']}, attention {side['attention']}" + compared(side))
        for count, row in side["rows"].items():
            idle = (
                f", GPU busy {row['gpu_busy_step_ms']} ms, idle {row['idle_share']:.1%}" if "idle_share" in row else ""
            )
            if name.startswith(("exact", "stock")):
                lines.append(
                    f"  {count}: prefill {row['prefill_s']:.4f} s, decode step {row['decode_step_ms']} ms{idle}"
                )
    return "\n".join(lines)


def compared(side: dict[str, Any]) -> str:
    found = side.get("against_training")
    if found is None:
        return ""
    return (
        f"; {found['log_probs_different']} of {found['log_probs_compared']} log-probabilities are not the training "
        f"forward's, by up to {found['max_log_prob_diff']:.2g}"
    )


if __name__ == "__main__":
    sys.exit(main())
