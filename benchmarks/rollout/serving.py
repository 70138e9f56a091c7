"""Serving, as its users see it: requests that come at a rate, with lengths as in chats.

    python -m benchmarks.rollout.serving --shape qwen3-1.7b --out benchmarks/results/serving_h100.json
    python -m benchmarks.rollout.serving --shape qwen3-1.7b --modes offline vllm-offline --rates inf   # only throughput

Every mode serves the same requests: prompts of 64 to 512 random tokens, response lengths log-normal with mean 245, one
process after another on the same device, each after a warm-up that is not counted.

* ``offline``: ``Engine.generate`` with all requests at once; ``stock``: the same with ``batch_invariant=False``, as
  others decode: cuBLAS, compiled pointwise operators, CUDA graphs, and the attention that its line names.
* ``async``: ``AsyncEngine`` in one process; ``http``: ``vexact serve`` and a client in another process, streamed.
* ``vllm-offline``, ``vllm-http``: vLLM with its defaults, where it is installed (``--vllm_python`` names its Python).

Times to the first token and per token after it, req/s and out tok/s; at the rate ``inf`` also the share of the memory
roofline (shared/roofline.py), every slot always busy. ``--shape tiny`` runs on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rollout.serving_load import Load, Times, arrivals, draw, play, play_http, summary
from benchmarks.shared.options import at_least_one, checkpoint, has_gpu, out_file, part, per_second, program, refuse

ROOT = Path(__file__).resolve().parents[2]
OURS = ("offline", "stock", "async", "http")
VLLM = ("vllm-offline", "vllm-http")
AT_ONCE = ("offline", "stock", "vllm-offline")  # have no notion of a rate
MAX_LEN = 2048


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    if arguments.run is not None:  # one mode, in this process
        arguments.out.write_text(json.dumps(run_mode(arguments, arguments.run)))
        return
    from benchmarks.shared.clock import machine
    from benchmarks.shared.roofline import Traffic
    from benchmarks.trainer.end_to_end import random_checkpoint
    from benchmarks.trainer.grpo_run import SHAPES

    if arguments.shape not in SHAPES:
        refuse(f"--shape {arguments.shape} is not known; use one of {', '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model_path is None:
            raw = SHAPES[arguments.shape].raw | {"eos_token_id": 1, "rope_theta": 1e6}
            arguments.model_path = random_checkpoint(raw, Path(folder) / "model")
        raw = config_of(arguments)
        loads = draw(arguments.requests, raw["vocab_size"], arguments.seed, scale(arguments))
        bound = Traffic.of(raw).tokens_per_s([(len(load.prompt), load.max_tokens) for load in loads], arguments.slots)
        report: dict[str, Any] = machine() | {
            "arguments": vars(arguments) | {"rates": [*map(str, arguments.rates)]},
            "runs": {},
        }
        report["roofline_tok_per_s"] = round(bound, 1)
        for mode in arguments.modes:
            found = in_own_process(arguments, mode, Path(folder) / "found.json")
            for rate, figures in found.items():
                if rate == "inf" and report["gpu"]:
                    figures["of_roofline"] = round(figures["out_tok_per_s"] / bound, 3)
                print(line(mode, rate, figures), flush=True)
            report["runs"][mode] = found
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report, indent=2, default=str) + "\n")


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="qwen3-1.7b" if has_gpu() else "tiny", help="random weights of this shape")
    add("--model_path", type=checkpoint, help="a checkpoint instead")
    add("--modes", nargs="+", default=[*OURS, *VLLM], choices=(*OURS, *VLLM))
    add("--rates", nargs="+", type=per_second, default=[math.inf, 20.0, 10.0], help="requests per second")
    add("--requests", type=at_least_one, default=768)
    add("--slots", type=at_least_one, default=256, help="max_num_seqs of every engine")
    add("--warmup", type=at_least_one, default=256, help="requests before the counted ones")
    add("--memory", type=part, default=0.8, help="share of the GPU's memory that each engine may take")
    add("--seed", type=int, default=0)
    add("--vllm_python", type=program, default=sys.executable, help="a Python that has vLLM")
    add("--out", type=out_file)
    add("--run", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def scale(arguments: argparse.Namespace) -> float:
    return 0.1 if arguments.shape == "tiny" else 1.0


def line(mode: str, rate: str, figures: dict[str, Any]) -> str:
    if "missing" in figures:
        return f"{mode:13} {figures['missing']}"
    text = f"{mode:13} {rate:>5} req/s asked: {figures['req_per_s']:8.2f} req/s"
    text += f" {figures['out_tok_per_s']:9.1f} out tok/s"
    for name in ("ttft_ms", "tpot_ms"):
        if name in figures:
            text += f"  {name[:4].upper()} p50 {figures[name]['p50']:.1f} p95 {figures[name]['p95']:.1f} ms"
    text += f"  {figures['of_roofline']:.0%} of the roofline" if "of_roofline" in figures else ""
    return text + (f"  attention: {figures['attention']}" if mode == "stock" else "")


def in_own_process(arguments: argparse.Namespace, mode: str, out: Path) -> dict[str, dict[str, Any]]:
    """Figures by rate. The mode's process has the device to itself; what it prints is not ours to read."""
    python = arguments.vllm_python if mode in VLLM else sys.executable
    if mode in VLLM and subprocess.run([python, "-c", "import vllm"], capture_output=True, check=False).returncode:
        return {"": {"missing": f"vLLM is not installed for {python}"}}
    command = [python, "-m", "benchmarks.rollout.serving", "--run", mode, "--out", str(out)]
    command += ["--model_path", str(arguments.model_path), "--shape", arguments.shape]
    for name in ("requests", "slots", "warmup", "memory", "seed"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--rates", *map(str, [math.inf] if mode in AT_ONCE else arguments.rates)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if result.returncode:
        raise SystemExit(f"{mode} failed with exit code {result.returncode}; its messages stand above")
    return dict(json.loads(out.read_text()))


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return dict(json.loads((Path(arguments.model_path) / "config.json").read_text()))


def longest(arguments: argparse.Namespace) -> int:
    return min(MAX_LEN, config_of(arguments)["max_position_embeddings"])


def run_mode(arguments: argparse.Namespace, mode: str) -> dict[str, dict[str, Any]]:
    vocab_size = config_of(arguments)["vocab_size"]
    warm = draw(arguments.warmup, vocab_size, arguments.seed + 1, scale(arguments))
    loads = draw(arguments.requests, vocab_size, arguments.seed, scale(arguments))
    with PLAYERS[mode](arguments) as player:
        player(warm, math.inf)
        named = {"attention": player.attention} if hasattr(player, "attention") else {}
        return {f"{rate:g}": named | summary(player(loads, rate), loads) for rate in arguments.rates}


def make_engine(arguments: argparse.Namespace, **config: Any) -> Any:
    import torch

    from vexact.rollout import Engine

    cuda = torch.cuda.is_available()
    config |= {"dtype": "bfloat16" if cuda else "float32", "max_num_seqs": arguments.slots}
    config |= {"max_model_len": longest(arguments), "gpu_memory_utilization": arguments.memory}
    return Engine(arguments.model_path, **config)


def at_once(loads: list[Load], seconds: float) -> list[Times]:
    """Of a call that tells only when all is done."""
    return [Times(0.0, end=seconds, tokens=load.max_tokens) for load in loads]


@contextmanager
def offline(arguments: argparse.Namespace, **config: Any) -> Iterator[Any]:
    from vexact.rollout import SamplingParams

    engine = make_engine(arguments, **config)

    def play_all(loads: list[Load], rate: float) -> list[Times]:
        params = [SamplingParams(max_tokens=load.max_tokens, ignore_eos=True) for load in loads]
        started = time.monotonic()
        samples = engine.generate([load.prompt for load in loads], params)
        seconds = time.monotonic() - started
        assert [len(sample.token_ids) for sample in samples] == [load.max_tokens for load in loads]
        return at_once(loads, seconds)

    play_all.attention = engine.attention  # type: ignore[attr-defined]
    yield play_all


def stock(arguments: argparse.Namespace) -> Any:
    return offline(arguments, batch_invariant=False)


@contextmanager
def in_process(arguments: argparse.Namespace) -> Iterator[Any]:
    from vexact.rollout import SamplingParams
    from vexact.rollout.async_engine import AsyncEngine

    engine = AsyncEngine(make_engine(arguments))

    async def send(load: Load, times: Times, start: float) -> None:
        params = SamplingParams(max_tokens=load.max_tokens, ignore_eos=True)
        async with engine.stream(load.prompt, params) as deltas:
            async for delta in deltas:
                times.tokens += len(delta.token_ids)
            times.first, times.end = deltas.first_token_at - start, time.monotonic() - start

    def play_all(loads: list[Load], rate: float) -> list[Times]:
        return asyncio.run(play(loads, arrivals(len(loads), rate, arguments.seed), send))

    try:
        yield play_all
    finally:
        engine.close()


@contextmanager
def over_http(arguments: argparse.Namespace, command: list[str], port: int) -> Iterator[Any]:
    """Starts a server, waits until it is healthy, ends it."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    base = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {process.returncode}")
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)

        def play_all(loads: list[Load], rate: float) -> list[Times]:
            due = arrivals(len(loads), rate, arguments.seed)
            return asyncio.run(play_http(f"{base}/v1", "bench", loads, due))

        yield play_all
    finally:
        process.terminate()
        process.wait()


def http(arguments: argparse.Namespace) -> Any:
    port = free_port()
    command = [sys.executable, "-m", "vexact", "serve", "--model_path", str(arguments.model_path), "--port", str(port)]
    command += ["--served_model_name", "bench", "--max_num_seqs", str(arguments.slots), "--max_queue", "100000"]
    command += ["--max_model_len", str(longest(arguments)), "--gpu_memory_utilization", str(arguments.memory)]
    return over_http(arguments, command, port)


def vllm_http(arguments: argparse.Namespace) -> Any:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(arguments.model_path)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "bench", "--dtype", "bfloat16"]
    command += ["--max-num-seqs", str(arguments.slots), "--max-model-len", str(longest(arguments))]
    command += ["--gpu-memory-utilization", str(arguments.memory)]
    return over_http(arguments, command, port)


@contextmanager
def vllm_offline(arguments: argparse.Namespace) -> Iterator[Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(arguments.model_path),
        dtype="bfloat16",
        max_num_seqs=arguments.slots,
        max_model_len=longest(arguments),
        gpu_memory_utilization=arguments.memory,
        skip_tokenizer_init=True,
        generation_config="vllm",
    )

    def play_all(loads: list[Load], rate: float) -> list[Times]:
        prompts = [{"prompt_token_ids": load.prompt} for load in loads]
        params = [
            SamplingParams(max_tokens=load.max_tokens, ignore_eos=True, logprobs=0, detokenize=False) for load in loads
        ]
        started = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - started
        assert [len(one.outputs[0].token_ids) for one in outputs] == [load.max_tokens for load in loads]
        return at_once(loads, seconds)

    yield play_all


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


PLAYERS: dict[str, Any] = {
    "offline": offline,
    "stock": stock,
    "async": in_process,
    "http": http,
    "vllm-offline": vllm_offline,
    "vllm-http": vllm_http,
}

if __name__ == "__main__":
    main()
