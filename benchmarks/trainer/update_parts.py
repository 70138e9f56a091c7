"""Where the time of an update goes: kernels by device time, calls that the host waits in, and what is neither.

    python -m benchmarks.trainer.update_parts --shape qwen3-30b-a3b --layers 2 --token_budget 2048 --out …
    torchrun --nproc-per-node=2 -m benchmarks.trainer.update_parts --shape qwen3-30b-a3b --layers 4 --expert_groups 2

The actor as the trainer builds it (fp32 masters, bf16 compute, FSDP2), all layers computed again, random weights, one
optimizer step over sequences of equal length in --micro_batches groups for each rank. ``update_s`` is without a
profiler, the median of --rounds; ``busy`` is the share of a profiled update in which a kernel ran on rank 0's GPU.
``waits_ms`` are the runtime's calls that stop the host, ``host_ms`` what its operations take themselves, ``places``
where Python was in another update, by samples, and ``kernel_calls`` how often the most frequent kernels ran. Peer: the
update's own floating point operations at the GPU's peak (``mfu``). A CPU run with ``--shape tiny`` is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.clock import covered, environment
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.shared.samples import sampled, shares
from benchmarks.trainer.grpo_run import SHAPES
from vexact.device import resolve_device
from vexact.models import CausalLM, ModelConfig
from vexact.models.flops import training_flops
from vexact.trainer.workers.peak_flops import peak_flops
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.training.parallel.ranks import close_process_group
from vexact.types import Sample, TrainSequence

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "aten::item")
TOP = 24


def sequences(count: int, length: int, vocab_size: int) -> list[TrainSequence]:
    """A third prompt, the rest response; log-probabilities of the rollout that are no one's."""
    draw = np.random.default_rng(0)
    made = []
    for index in range(count):
        tokens = tuple(draw.integers(0, vocab_size, length + 1).tolist())
        prompt, response = tokens[: length // 3], tokens[length // 3 :]
        logprobs = np.full(len(response), -np.log(vocab_size), np.float32)
        everything = np.full(len(response), -np.inf, np.float32)
        sample = Sample(str(index), prompt, response, logprobs, everything, 1.0, "length", 0)
        made.append(TrainSequence(sample, draw.normal(size=len(response)).astype(np.float32)))
    return made


def drawn_model(config: ModelConfig, device: torch.device) -> CausalLM:
    """fp32, drawn on the device, where billions of numbers take no time; the same on every rank."""
    with torch.device("meta"):
        model = CausalLM(config).float()
    model.to_empty(device=device)
    model.init_rope(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def parts(trace: profile, seconds: float) -> dict:
    """Milliseconds of an update by kernel, of the host by call that waits, and by what it does itself."""
    kernels: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    spans = []
    for event in trace.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
            calls[event.name] += 1
        elif event.name in WAITS:
            waits[event.name] += event.time_range.elapsed_us()
    host = sorted(trace.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return {
        "profiled_s": round(seconds, 4),
        "busy": round(covered(spans) / 1e6 / seconds, 4),
        "kernels": calls.total(),
        "kernel_calls": {name[:90]: count for name, count in calls.most_common(TOP)},
        "kernel_ms": {name[:90]: round(us / 1e3, 3) for name, us in kernels.most_common(TOP)},
        "other_kernel_ms": round(sum(us for _, us in kernels.most_common()[TOP:]) / 1e3, 3),
        "host_ms": {row.key[:90]: round(row.self_cpu_time_total / 1e3, 3) for row in host[:TOP]},
        "waits_ms": {name: round(us / 1e3, 3) for name, us in waits.most_common()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--layers", type=at_least_one, help="instead of the shape's own")
    parser.add_argument("--length", type=at_least_one, help="of a sequence, instead of the shape's prompt and response")
    parser.add_argument("--token_budget", type=at_least_one, help="of a micro-batch, instead of the shape's")
    parser.add_argument("--micro_batches", type=at_least_one, default=8, help="of a rank")
    parser.add_argument("--expert_groups", type=at_least_one, default=1)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--offload", action="store_true", help="weights and moments wait in host memory")
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    layers = arguments.layers or shape.raw["num_hidden_layers"]
    config = ModelConfig.from_hf_dict(shape.raw | {"num_hidden_layers": layers, "rope_theta": 1e6})
    device, ranks, group = torch.device(resolve_device("auto")), 1, None
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group, ranks = dist.group.WORLD, dist.get_world_size()
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", dist.get_rank()))
    length = arguments.length or shape.prompt_tokens + shape.new_tokens
    budget = arguments.token_budget or shape.token_budget
    given = sequences(arguments.micro_batches * ranks * (budget // length), length, config.vocab_size)
    settings = ActorConfig(
        dtype="bfloat16" if device.type == "cuda" else "float32",
        ppo_mini_batch_size=len(given),
        ppo_max_token_len_per_gpu=budget,
        expert_parallel_size=arguments.expert_groups,
        enable_gradient_checkpointing=True,
        param_offload=arguments.offload,
        optimizer_offload=arguments.offload,
        optim=OptimConfig(lr=1e-6),
    )
    actor = Actor(drawn_model(config, device), settings, device, group=group)

    def update() -> float:
        started = time.perf_counter()
        metrics = actor.update(given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert metrics["actor/grad_norm"] > 0
        return time.perf_counter() - started

    first = update()
    rounds = [update() for _ in range(arguments.rounds)]
    seconds = statistics.median(rounds)
    with sampled() as places:
        update()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        profiled = update()
    report = environment() | {"shape": arguments.shape, "layers": layers, "ranks": ranks, "length": length}
    report |= {"offload": arguments.offload, "first_update_s": round(first, 3)}
    report |= {"rounds_s": [round(each, 3) for each in rounds]}
    report |= {"token_budget": budget, "expert_groups": arguments.expert_groups, "sequences": len(given)}
    flops = training_flops(config, [(length // 3, length + 1 - length // 3)] * len(given))
    peak = peak_flops(device, settings.dtype)
    report |= {"update_s": round(seconds, 4), "micro_batch_ms": round(1e3 * seconds / arguments.micro_batches, 3)}
    report |= {"mfu": None if peak is None else round(flops / seconds / peak / ranks, 4)}
    report |= {"places": shares(places, TOP), **parts(trace, profiled)}
    if group is None or dist.get_rank() == 0:
        print(json.dumps(report, indent=2))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    if group is not None:
        close_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
