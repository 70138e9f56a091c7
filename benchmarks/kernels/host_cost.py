"""What a forward costs the host: microseconds from Python per operator, and milliseconds per forward of all layers.

    python -m benchmarks.kernels.host_cost --out benchmarks/results/host_cost_h100.json

Shapes are those of Qwen3-1.7B with random weights. Host times end when the last kernel is in the stream, not when it
has run; the device is idle at the start of each, so that a full queue is never waited for. "step" waits for the
device: what a user sees of one prompt or of one eager decode step. ``--profile N`` lists the N dearest functions.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.shared.clock import environment
from benchmarks.shared.options import at_least_one, needs_gpu, none_or_more, out_file
from benchmarks.trainer.end_to_end import QWEN3_1B7
from vexact.models import ModelConfig
from vexact.models.decoder import CausalLM
from vexact.ops import PackedMetadata, PagedMetadata

PAGE_SIZE = 64
DEVICE = "cuda"
WARM_UP_S = 1.5


def build(num_layers: int) -> CausalLM:
    """A model with random bf16 weights."""
    config = ModelConfig.from_hf_dict(QWEN3_1B7 | {"num_hidden_layers": num_layers})
    with torch.device("meta"):
        model = CausalLM(config).to(torch.bfloat16)
    model.to_empty(device=DEVICE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
    model.init_rope(DEVICE)
    return model


def caches(model: CausalLM, num_pages: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Zeroed pages of every layer."""
    shape = num_pages, PAGE_SIZE, model.config.num_kv_heads, model.config.head_dim
    return [
        (
            torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE),
            torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE),
        )
        for _ in range(model.config.num_layers)
    ]


def paged(new: list[int], keys: list[int]) -> tuple[torch.Tensor, torch.Tensor, PagedMetadata]:
    """Token ids, positions and metadata of sequences with ``new`` tokens of ``keys``, pages one after another."""
    pages = [-(-count // PAGE_SIZE) for count in keys]
    table, slots, positions, first = torch.full((len(keys), max(pages)), -1, dtype=torch.int32), [], [], 0
    for row, (fresh, count, held) in enumerate(zip(new, keys, pages, strict=True)):
        table[row, :held] = torch.arange(first, first + held, dtype=torch.int32)
        places = range(count - fresh, count)
        positions += places
        slots += [first * PAGE_SIZE + place for place in places]
        first += held
    ends = torch.tensor([0, *new]).cumsum(0).to(DEVICE, torch.int32)
    metadata = PagedMetadata(
        ends,
        torch.tensor(keys, dtype=torch.int32, device=DEVICE),
        table.to(DEVICE),
        torch.tensor(slots, device=DEVICE),
        max(new),
        max(keys),
    )
    return torch.randint(1000, (sum(new),), device=DEVICE), torch.tensor(positions, device=DEVICE), metadata


def host_ms(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median milliseconds until ``call`` returns, and until the device has finished, of a warm host."""
    until = time.perf_counter() + WARM_UP_S
    call()
    while time.perf_counter() < until:
        call()
    returned, finished = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        returned.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        finished.append(time.perf_counter() - started)
    return 1e3 * median(returned), 1e3 * median(finished)


def other_lengths(model: CausalLM, pages: list[tuple[torch.Tensor, torch.Tensor]], repeats: int) -> dict[str, float]:
    """A prompt of a length that has not been seen: every kind of launch is new once in its forward."""
    prompts = [paged([length], [length]) for length in range(401, 401 + 3 * repeats, 3)]
    returned, finished = [], []
    with torch.inference_mode():
        for ids, positions, metadata in prompts:
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.logits(model(ids, positions, metadata, pages)[-1:])
            returned.append(time.perf_counter() - started)
            torch.cuda.synchronize()
            finished.append(time.perf_counter() - started)
    row = {"host_ms": round(1e3 * median(returned), 2), "step_ms": round(1e3 * median(finished), 2)}
    print(f"{'a prompt of another length':45} host {row['host_ms']:7.2f} ms, step {row['step_ms']:7.2f} ms", flush=True)
    return row


class Timed:
    """Stands for an operator of a model and adds up what its calls take."""

    def __init__(self, op: Callable[..., Any]) -> None:
        self.op, self.seconds, self.calls = op, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = self.op(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        self.calls += 1
        return result


def per_operator(model: CausalLM, call: Callable[[], Any], repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds a call of each operator, and calls a forward."""
    from dataclasses import fields, replace

    from vexact.models.opset import set_ops

    original = model.ops
    timed = {field.name: Timed(getattr(original, field.name)) for field in fields(original)}
    set_ops(model, replace(original, **timed))
    for repeat in range(repeats + 1):
        torch.cuda.synchronize()
        call()
        if repeat == 0:  # other kernels than those of the fused operators are compiled
            for op in timed.values():
                op.seconds, op.calls = 0.0, 0
    set_ops(model, original)
    return {
        name: {"us": round(1e6 * op.seconds / op.calls, 1), "calls": op.calls // repeats}
        for name, op in timed.items()
        if op.calls
    }


def measure(num_layers: int, repeats: int, functions: int) -> dict[str, Any]:
    model = build(num_layers)
    pages = caches(model, 400)
    work = {
        "one prompt of 512": paged([512], [512]),
        "8 decoding": paged([1] * 8, [600] * 8),
        "8 decoding, a prompt of 256": paged([1] * 8 + [256], [600] * 8 + [256]),
    }
    forwards = {}
    for name, (ids, positions, metadata) in work.items():

        def forward(ids=ids, positions=positions, metadata=metadata):
            with torch.inference_mode():
                hidden = model(ids, positions, metadata, pages)
                return model.logits(hidden[-1:])

        forwards[name] = forward

    packed = PackedMetadata.from_lengths([512], DEVICE)
    ids, positions = torch.randint(1000, (512,), device=DEVICE), torch.arange(512, device=DEVICE)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, positions, packed).sum().backward()

    forwards["training, 512 tokens, forward and backward"] = train
    result: dict[str, Any] = {"forwards": {}}
    for name, call in forwards.items():
        returned, finished = host_ms(call, repeats)
        result["forwards"][name] = {"host_ms": round(returned, 2), "step_ms": round(finished, 2)}
        print(f"{name:45} host {returned:7.2f} ms, step {finished:7.2f} ms", flush=True)
    result["forwards"]["a prompt of another length"] = other_lengths(model, pages, repeats)
    result["operators"] = per_operator(model, forwards["one prompt of 512"], repeats)
    for name, row in result["operators"].items():
        print(f"  {name:16} {row['us']:7.1f} us, {row['calls']} calls", flush=True)
    if functions:
        with cProfile.Profile() as profile:
            for _ in range(repeats):
                torch.cuda.synchronize()
                forwards["one prompt of 512"]()
        pstats.Stats(profile).sort_stats("tottime").print_stats(functions)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=at_least_one, default=28)
    parser.add_argument("--repeats", type=at_least_one, default=20)
    parser.add_argument("--profile", type=none_or_more, default=0, metavar="N")
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    needs_gpu(parser)
    result = {**environment(), "layers": args.layers, **measure(args.layers, args.repeats, args.profile)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
