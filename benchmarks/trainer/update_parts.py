"""Where the time of an update goes: kernels by device time, calls that the host waits in, and what is neither.

    python -m benchmarks.trainer.update_parts --shape qwen3-30b-a3b --layers 2 --token_budget 2048 --out …
    torchrun --nproc-per-node=2 -m benchmarks.trainer.update_parts --shape qwen3-30b-a3b --layers 4 --expert_groups 2

The actor as the trainer builds it (fp32 masters, bf16 compute, FSDP2), all layers computed again, random weights, one
optimizer step over sequences of equal length in --micro_batches groups for each rank. ``update_s`` is without a
profiler, the median of --rounds; one more update gives its stages (``update_stages.py``), as rank 0 sees them; ``busy``
is the share of a profiled update in which a kernel ran on rank 0's GPU. ``waits_ms`` are the runtime's calls that stop
the host, ``host_ms`` what its operations take themselves, ``places`` where Python was in another update, by samples,
and ``kernel_calls`` how often the most frequent kernels ran; --only_times leaves these out. Peer: the update's own
floating point operations at the GPU's peak (``mfu``). A CPU run with ``--shape tiny`` is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.clock import covered, environment
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.shared.samples import sampled, shares
from benchmarks.trainer.grpo_run import SHAPES
from benchmarks.trainer.update_stages import stages
from vexact.device import resolve_device
from vexact.models import CausalLM, ModelConfig
from vexact.models.flops import training_flops
from vexact.trainer.workers.peak_flops import peak_flops
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.training.parallel.expert_parallel import ExpertRanks
from vexact.training.parallel.ranks import Ranks, close_process_group, local
from vexact.training.parallel.sharding import shard
from vexact.types import Sample, TrainSequence

EXPERTS = ("actor/moe_load_max_over_mean", "actor/moe_idle_experts")
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


def drawn_model(config: ModelConfig, ranks: Ranks, settings: ActorConfig, even: bool) -> CausalLM:
    """fp32, every rank's rows drawn on its device, where billions of numbers take no time.

    ``even``: what layers add to a token's embedding is little, so that tokens choose experts on their own, about as
    evenly as those of a trained model; all else being random, most would choose the same.
    """
    with torch.device("meta"):
        model = CausalLM(config).float()
    if ranks.mesh is not None:
        shard(model, ranks, settings.torch_dtype, ExpertRanks.of_process(settings.expert_parallel_size, ranks.group))
    model.to_empty(device=ranks.device)
    model.init_rope(ranks.device)
    generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                local(parameter).fill_(1.0)
            elif name.endswith(".bias"):
                local(parameter).zero_()
            else:
                little = even and name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
                local(parameter).normal_(0.0, 2e-4 if little else 0.02, generator=generator)
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


def looked_into(update: Callable[[], float], device: torch.device) -> dict:
    """Where Python was in one update, and the parts of another."""
    with sampled() as places:
        update()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        profiled = update()
    return {"places": shares(places, TOP), **parts(trace, profiled)}


def memory(device: torch.device) -> dict[str, float]:
    """The most that torch has held on a GPU so far, and how often it had to give memory back first."""
    if device.type != "cuda":
        return {}
    held = torch.cuda.memory_stats(device)
    peaks = {f"max_{kind}_gib": round(held[f"{kind}_bytes.all.peak"] / 2**30, 2) for kind in ("allocated", "reserved")}
    return peaks | {"alloc_retries": held["num_alloc_retries"]}


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
    parser.add_argument(
        "--even_experts", action="store_true", help="tokens choose experts about evenly, as trained ones do"
    )
    parser.add_argument("--only_times", action="store_true", help="neither samples nor a profile")
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
    ranks_of = Ranks.of_process(device, group)
    actor = Actor(drawn_model(config, ranks_of, settings, arguments.even_experts), settings, device, group=group)
    seen: dict[str, float] = {}

    first_rank = group is None or dist.get_rank() == 0

    def say(text: str) -> None:
        if first_rank:
            print(text, flush=True)

    def update() -> float:
        started = time.perf_counter()
        metrics = actor.update(given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert metrics["actor/grad_norm"] > 0
        seen.update({key: round(metrics[key], 2) for key in EXPERTS if key in metrics})
        took = time.perf_counter() - started
        say(f"update {took:.2f} s")
        return took

    first_stages = stages(actor, update)
    say(f"the first one: {first_stages}")
    rounds = [update() for _ in range(arguments.rounds)]
    seconds = statistics.median(rounds)
    staged = stages(actor, update)
    say(f"the last one: {staged}, {memory(device)}")
    inside = {} if arguments.only_times else looked_into(update, device)
    report = environment() | {"shape": arguments.shape, "layers": layers, "ranks": ranks, "length": length}
    report |= {"offload": arguments.offload, "even_experts": arguments.even_experts, "first_update": first_stages}
    report |= {"rounds_s": [round(each, 3) for each in rounds], **staged, **seen}
    report |= memory(device)
    report |= {"token_budget": budget, "expert_groups": arguments.expert_groups, "sequences": len(given)}
    flops = training_flops(config, [(length // 3, length + 1 - length // 3)] * len(given))
    peak = peak_flops(device, settings.dtype)
    report |= {
        "update_s": round(seconds, 4),
        "micro_batch_ms": round(1e3 * statistics.median(staged["micro_batches_s"]), 3),
    }
    report |= {"mfu": None if peak is None else round(flops / seconds / peak / ranks, 4)}
    report |= inside
    if first_rank:
        print(json.dumps(report, indent=2))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    if group is not None:
        close_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
