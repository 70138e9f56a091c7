"""Our engine beside vLLM: tokens per second at 1 to 256 sequences at once, and what the training forward says of both.

    PYTHONPATH=. python benchmarks/vllm_throughput.py --out benchmarks/results/vllm_h100.json

In the environment of the bridge (``submodules/vllm``). All sides load the same checkpoint with random weights, get the
same prompts, sample at temperature 1 without an end of sequence and report log-probabilities; prefix caches are off, KV
caches equally large. Each runs in a process of its own, one after another; ``vllm-invariant`` is vLLM with
``VLLM_BATCH_INVARIANT=1``. A repeat is one batch from the first prompt token to the last sampled one, after one of the
same size that is not counted; another batch of one token each tells prefill from decoding.

``--shape tiny`` is for a CPU, where the figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from end_to_end import random_checkpoint

from vexact.audit.environment import environment
from vexact.device import resolve_device
from vexact.models import load_model
from vexact.prepare.shapes import SHAPES
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores

TINY = SHAPES["qwen3-0.6b"] | {  # vLLM has no narrower heads on a CPU
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CASES = {"tiny": (TINY, 24, 16), "qwen3-1.7b": (SHAPES["qwen3-1.7b"], 512, 256)}
"""Configuration, prompt tokens, new tokens."""
SIDES = ("vexact", "vllm", "vllm-invariant")
SCORED = 8  # sequences whose log-probabilities are compared
ROOM = 1.1  # of the KV cache, for pages that are not full

Batch = list[tuple[list[int], list[float]]]
Generate = Callable[[Sequence[Sequence[int]], int], Batch]
"""(prompts, new tokens) -> tokens and their log-probabilities."""


def kv_cache_bytes(raw: dict, sequences: int, tokens: int, dtype: str) -> int:
    """For this many sequences at once."""
    per_token = 2 * raw["num_hidden_layers"] * raw["num_key_value_heads"] * raw["head_dim"]
    return int(ROOM * sequences * tokens * per_token * getattr(torch, dtype).itemsize)


def vexact_side(model: Path, limits: dict[str, Any], dtype: str) -> Generate:
    from vexact.rollout import Engine, SamplingParams

    engine = Engine(model, dtype=dtype, device=resolve_device("auto"), **limits)

    def generate(prompts: Sequence[Sequence[int]], new: int) -> Batch:
        samples = engine.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
        return [(list(sample.token_ids), sample.logprobs.tolist()) for sample in samples]

    return generate


def vllm_side(model: Path, limits: dict[str, Any], dtype: str) -> Generate:
    from vexact_vllm import environment as settings

    settings.prepare()
    from vllm import LLM, SamplingParams

    on_gpu = torch.cuda.is_available()
    llm = LLM(
        model=str(model),
        dtype=dtype,
        enforce_eager=not on_gpu,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        **{key: value for key, value in limits.items() if key != "kv_cache_bytes"},
        kv_cache_memory_bytes=limits["kv_cache_bytes"],
    )

    def generate(prompts: Sequence[Sequence[int]], new: int) -> Batch:
        params = SamplingParams(max_tokens=new, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return [
            (list(one.token_ids), [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)])
            for one in (output.outputs[0] for output in outputs)
        ]

    return generate


def measure(generate: Generate, raw: dict, sizes: Sequence[int], lengths: tuple[int, int], repeats: int) -> dict:
    """Per number of sequences: seconds (median and range) and tokens per second. And the last sample of ``SCORED``."""
    prompt_tokens, new = lengths
    rng = random.Random(0)
    rows, kept = {}, {}
    for count in sizes:
        times: dict[int, list[float]] = {new: [], 1: []}
        for repeat in range(repeats + 1):
            for tokens, seconds in times.items():
                prompts = [[rng.randrange(raw["vocab_size"]) for _ in range(prompt_tokens)] for _ in range(count)]
                started = time.perf_counter()
                batch = generate(prompts, tokens)
                if repeat:
                    seconds.append(time.perf_counter() - started)
                assert [len(ids) for ids, _ in batch] == [tokens] * count
                if tokens == new and count >= SCORED:
                    kept = {"prompts": prompts[:SCORED], "samples": batch[:SCORED]}
        whole, first = statistics.median(times[new]), statistics.median(times[1])
        rows[count] = {
            "seconds": round(whole, 4),
            "fastest_slowest_s": [round(min(times[new]), 4), round(max(times[new]), 4)],
            "tokens_per_s": round(count * new / whole, 1),
            "prefill_s": round(first, 4),
            "decode_tokens_per_s": round(count * (new - 1) / max(whole - first, 1e-9), 1),
        }
    return {"rows": rows, **kept}


def score(model: Path, dtype: str, prompts: list[list[int]], samples: Batch) -> dict:
    """How far the log-probabilities of samples are from the training forward's."""
    device = torch.device(resolve_device("auto"))
    trained = load_model(model, dtype=getattr(torch, dtype), device=device)
    sequences = [TokenSequence(prompt, ids) for prompt, (ids, _) in zip(prompts, samples, strict=True)]
    with torch.no_grad():
        ours = token_scores(trained, pack_tokens(sequences, device)).logprobs.cpu().numpy()
    theirs = np.concatenate([np.array(logprobs, np.float32) for _, logprobs in samples])
    return {
        "log_probs_compared": len(ours),
        "log_probs_different": int((ours.view(np.int32) != theirs.view(np.int32)).sum()),
        "max_log_prob_diff": float(np.abs(ours - theirs).max()),
        "max_prob_diff": float(np.abs(np.exp(ours) - np.exp(theirs)).max()),
    }


def run_side(arguments: argparse.Namespace, model: Path) -> dict:
    """The child: one side, its versions, what it measured."""
    raw, *lengths = CASES[arguments.shape]
    sizes, dtype = arguments.sequences, _dtype()
    limits = {
        "max_model_len": sum(lengths),
        "max_num_seqs": max(sizes),
        "max_num_batched_tokens": max(8192 if torch.cuda.is_available() else 256, max(sizes)),
        "enable_prefix_caching": False,
        "kv_cache_bytes": kv_cache_bytes(raw, max(sizes), sum(lengths), dtype),
    }
    start = vexact_side if arguments.side == "vexact" else vllm_side
    measured = measure(start(model, limits, dtype), raw, sizes, tuple(lengths), arguments.repeats)
    found = environment(torch.device(resolve_device("auto")))
    if "vllm" in sys.modules:
        found["vllm"] = sys.modules["vllm"].__version__
    return {"limits": limits, "environment": found, **measured}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CASES, default="qwen3-1.7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["vexact", "vllm"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a checkpoint of that shape; by default one with random weights")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # the child
    arguments = parser.parse_args()
    if arguments.side is not None:
        arguments.out.write_text(json.dumps(run_side(arguments, arguments.model)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        model = arguments.model or random_checkpoint(CASES[arguments.shape][0], Path(work) / "model")
        return compare(arguments, model, Path(work))


def compare(arguments: argparse.Namespace, model: Path, work: Path) -> int:
    """Runs the sides, prints the ratios and writes the record, also of those that ran when another could not."""
    sides = {side: result for side in arguments.sides if (result := started(arguments, side, model, work)) is not None}
    record = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "shape": arguments.shape,
        "dtype": _dtype(),
        "prompt_tokens": CASES[arguments.shape][1],
        "new_tokens": CASES[arguments.shape][2],
        "repeats": arguments.repeats,
        "not_run": [side for side in arguments.sides if side not in sides],
        "sides": {},
    }
    for side, result in sides.items():
        if "samples" in result:
            result["against_training"] = score(model, _dtype(), result.pop("prompts"), result.pop("samples"))
        record["sides"][side] = result
    print(table(record))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if record["not_run"] else 0


def started(arguments: argparse.Namespace, side: str, model: Path, work: Path) -> dict | None:
    """What a side's process wrote; None, after its error, if it failed."""
    print(f"{side} …", file=sys.stderr, flush=True)
    out = work / f"{side}.json"
    command = [sys.executable, __file__, "--side", side, "--model", str(model), "--out", str(out)]
    command += ["--shape", arguments.shape, "--repeats", str(arguments.repeats), "--sequences"]
    environ = os.environ | ({"VLLM_BATCH_INVARIANT": "1"} if side == "vllm-invariant" else {})
    done = subprocess.run([*command, *map(str, arguments.sequences)], env=environ, check=False)
    if done.returncode:
        print(f"{side} ended with exit code {done.returncode}", file=sys.stderr)
        return None
    return json.loads(out.read_text())


def table(record: dict) -> str:
    """Tokens per second, and each side's ratio to the first one."""
    sides = record["sides"]
    lines = [f"{'sequences':>9}" + "".join(f"  {side + ', tokens/s':>26}" for side in sides)]
    first = next(iter(sides.values()), {"rows": {}})["rows"]
    for count in first:
        shown = (
            f"{result['rows'][count]['tokens_per_s']:.1f} ({_ratio(result, first, count)}x)"
            for result in sides.values()
        )
        lines.append(f"{count:>9}" + "".join(f"  {text:>26}" for text in shown))
    for side, result in sides.items():
        if (found := result.get("against_training")) is not None:
            lines.append(
                f"{side}: {found['log_probs_different']} of {found['log_probs_compared']} log-probabilities are not "
                f"the training forward's, by up to {found['max_log_prob_diff']:.2g}"
            )
    return "\n".join(lines)


def _ratio(result: dict, first: dict, count: str) -> str:
    return f"{result['rows'][count]['tokens_per_s'] / first[count]['tokens_per_s']:.2f}"


def _dtype() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


if __name__ == "__main__":
    sys.exit(main())
