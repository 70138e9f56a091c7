"""The rollout's weights after an update: parts of a colocated sync, beside a plain copy of the same bytes.

    python -m benchmarks.multi_gpu.weight_sync --out FILE                     # one GPU
    torchrun --nproc_per_node 2 -m benchmarks.multi_gpu.weight_sync --out FILE  # two

fp32 masters, dealt to the ranks by FSDP2, go in bf16 to an engine on every rank. The floor moves the same bytes with
plain calls and checks nothing: one rank casts every tensor into place; several also all-gather one flat buffer of all.
A flipped bit is planted at the end, which has to be found.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.shared.clock import environment
from benchmarks.shared.options import at_least_one, out_file
from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine
from vexact.training import Actor, ActorConfig
from vexact.weights import WeightSyncError, checksums, sync_weights
from vexact.weights.transfer import Incoming

SHAPES = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 16},
}
SHARED = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def seconds(call: Callable[[], Any], calls: int) -> tuple[float, list[Any]]:
    """Median wall-clock seconds of a call on the slowest rank, after one that warms up; what the calls returned."""
    call()
    taken, results = [], []
    for _ in range(calls):
        torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        started = perf_counter()
        results.append(call())
        torch.cuda.synchronize()
        taken.append(perf_counter() - started)
    longest = torch.tensor(taken, device="cuda")
    if dist.is_initialized():
        dist.all_reduce(longest, dist.ReduceOp.MAX)
    return statistics.median(longest.tolist()), results


def plain_copy(actor: Actor, targets: list[Tensor], world_size: int) -> Callable[[], None]:
    """The same bytes with as few calls as there can be, unchecked."""
    rows = [shard for _, shard, _ in actor.named_shards()]
    if world_size == 1:

        def cast_into_place() -> None:
            for target, source in zip(targets, rows, strict=True):
                target.copy_(source)

        return cast_into_place
    shapes = [shape for _, _, shape in actor.named_shards()]
    parts = [-(-shape[0] // world_size) * (target.numel() // shape[0]) for shape, target in zip(shapes, targets)]
    flat = torch.empty(sum(parts), dtype=torch.bfloat16, device="cuda")
    gathered = torch.empty(world_size * sum(parts), dtype=torch.bfloat16, device="cuda")
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather_and_copy() -> None:
        start = 0
        for row, part in zip(rows, parts, strict=True):
            flat[start : start + row.numel()].copy_(row.reshape(-1))
            start += part
        gather(gathered, flat)
        start = 0
        for target in targets:
            target.view(-1).copy_(gathered[start : start + target.numel()])
            start += target.numel()

    return gather_and_copy


def finds_a_flipped_bit(actor: Actor, engine: Engine, rank: int) -> bool:
    """Whether every rank names the tensor that one bit of the last rank's engine is wrong in."""
    name, sums = "layers.0.mlp.down_proj.weight", Incoming.checksums
    last = rank == (dist.get_world_size() - 1 if dist.is_initialized() else 0)

    def flipped(self: Incoming) -> Tensor:
        if last:
            dict(engine.model.named_parameters())[name].detach().view(torch.int16)[-1, -1] ^= 1
        return sums(self)

    Incoming.checksums = flipped  # type: ignore[method-assign]
    try:
        sync_weights(actor, engine, 99)
    except WeightSyncError as error:
        return error.difference is not None and error.difference.tensor == name
    finally:
        Incoming.checksums = sums  # type: ignore[method-assign]
    return False


def build(size: str, world_size: int) -> tuple[Actor, Engine]:
    config = ModelConfig.from_hf_dict(SHARED | SHAPES[size])
    masters, rollout = random_model(config, 0, device="cuda"), random_model(config, 1, torch.bfloat16, "cuda")
    actor = Actor(masters, ActorConfig(dtype="bfloat16", ppo_mini_batch_size=world_size), "cuda")
    return actor, Engine(model=rollout, max_model_len=1024, num_pages=16)


def measure(size: str, actor: Actor, engine: Engine, bucket_mib: int, calls: int) -> dict[str, Any]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    targets = [parameter.detach() for parameter in engine.model.parameters()]
    floor, _ = seconds(plain_copy(actor, targets, world_size), calls)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    version = iter(range(1, 10 * calls + 100))
    whole, results = seconds(lambda: sync_weights(actor, engine, next(version), bucket_bytes=bucket_mib << 20), calls)
    extra = torch.cuda.max_memory_allocated() - before
    fingerprint, _ = seconds(lambda: checksums(targets), calls)
    num_bytes = results[-1]["rollout/weights_bytes"]
    return {
        "model": size,
        "ranks": world_size,
        "tensors": len(targets),
        "gigabytes": num_bytes / 1e9,
        "bucket_mib": bucket_mib,
        "sync_ms": 1e3 * whole,
        "parts_ms": {
            name.removeprefix("timing_s/weights_"): 1e3 * statistics.median(result[name] for result in results)
            for name in results[-1]
            if name.startswith("timing_s/")
        },
        "plain_copy_ms": 1e3 * floor,
        "checksums_of_all_ms": 1e3 * fingerprint,
        "checksums_gb_per_s": num_bytes / 1e9 / fingerprint,
        "extra_memory_mib": extra / 2**20,
        "flipped_bit_named": finds_a_flipped_bit(actor, engine, rank),
    }


def described(entry: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {value:.1f}" for name, value in entry["parts_ms"].items())
    return (
        f"{entry['model']} on {entry['ranks']} GPU(s), buckets of {entry['bucket_mib']} MiB: "
        f"sync {entry['sync_ms']:.1f} ms ({parts}), "
        f"{entry['sync_ms'] / entry['plain_copy_ms']:.2f}x of a plain copy ({entry['plain_copy_ms']:.1f} ms); "
        f"checksums of all {entry['checksums_of_all_ms']:.2f} ms, {entry['checksums_gb_per_s']:.0f} GB/s; "
        f"{entry['extra_memory_mib']:.0f} MiB extra; flipped bit named: {entry['flipped_bit_named']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="1.7B")
    parser.add_argument("--bucket-mib", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--calls", type=at_least_one, default=10)
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    actor, engine = build(arguments.model, dist.get_world_size() if dist.is_initialized() else 1)
    entries = [measure(arguments.model, actor, engine, mib, arguments.calls) for mib in arguments.bucket_mib]
    if not dist.is_initialized() or dist.get_rank() == 0:
        for entry in entries:
            print(described(entry))
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            facts = {**environment(), "entries": entries}
            arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()
    if not all(entry["flipped_bit_named"] for entry in entries):
        raise SystemExit("a flipped bit was not found")


if __name__ == "__main__":
    main()
