"""One decode step of a dense model with random weights: what it computes, what it reads, and which kernels it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.roofline import BYTES
from vexact.models import ModelConfig
from vexact.models.decoder import CausalLM
from vexact.ops import PagedMetadata

PAGE_SIZE = 64


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch of a step."""

    kind: str  # what it is for
    function: str  # its name in a trace
    read: int  # bytes that it has to read or write


@dataclass(frozen=True, slots=True)
class Step:
    """A step of ``rows`` sequences of ``keys`` keys each, the new one included."""

    model: CausalLM
    ids: Tensor  # (rows,) int64: may be overwritten between two runs
    keys: int
    run: Callable[[], Tensor]  # logits (rows, V) fp32

    @property
    def rows(self) -> int:
        return len(self.ids)


def random_decoder(raw: dict[str, Any], num_layers: int, device: torch.device) -> CausalLM:
    """bf16 weights on a GPU, fp32 on a CPU."""
    config = ModelConfig.from_hf_dict(raw | {"num_hidden_layers": num_layers})
    with torch.device("meta"):
        model = CausalLM(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1.0)
    model.init_rope(device)
    return model


def decode_step(model: CausalLM, rows: int, keys: int) -> Step:
    """Pages lie in random order, as after a while of serving, and hold random keys and values."""
    weight, config = model.lm_head_weight, model.config
    device, held = weight.device, -(-keys // PAGE_SIZE)
    generator = torch.Generator(device).manual_seed(rows)
    table = torch.randperm(rows * held, generator=generator, device=device).view(rows, held)
    shape = rows * held, PAGE_SIZE, config.num_kv_heads, config.head_dim
    caches = [
        tuple(torch.empty(shape, device=device, dtype=weight.dtype).normal_(generator=generator) for _ in range(2))
        for _ in range(config.num_layers)
    ]
    last = keys - 1
    metadata = PagedMetadata(
        torch.arange(rows + 1, dtype=torch.int32, device=device),
        torch.full((rows,), keys, dtype=torch.int32, device=device),
        table.to(torch.int32),
        table[:, last // PAGE_SIZE] * PAGE_SIZE + last % PAGE_SIZE,
        1,
        keys,
    )
    ids = torch.randint(config.vocab_size, (rows,), generator=generator, device=device)
    positions = torch.full((rows,), last, device=device)

    @torch.inference_mode()
    def run() -> Tensor:
        return model.logits(model(ids, positions, metadata, caches))

    return Step(model, ids, keys, run)


def kernels(step: Step, *, fused: bool) -> list[Kernel]:
    """What the step launches, in order; keys that fit one chunk, and SwiGLU in a launch of its own unless ``fused``."""
    config, rows = step.model.config, step.rows
    hidden, vocabulary = config.hidden_size, config.vocab_size
    queries, both = config.qkv_sizes[0], sum(config.qkv_sizes)

    def product(kind: str, weight: Tensor, out: int, out_bytes: int = BYTES, function: str = "matmul_") -> Kernel:
        return Kernel(kind, function, BYTES * (weight.numel() + rows * weight.shape[1]) + rows * out * out_bytes)

    def norm(tensors: int) -> Kernel:
        return Kernel("norm", "_forward_kernel", BYTES * (tensors * rows * hidden + hidden))

    found = [Kernel("embedding", "_forward_kernel", BYTES * 2 * rows * hidden)]
    for index, layer in enumerate(step.model.layers):
        mlp, attention = layer.mlp, layer.attention
        width = mlp.down_proj.weight.shape[1]
        cached = rows * step.keys * 2 * config.num_kv_heads * config.head_dim
        found += [
            norm(4 if index else 2),
            product("qkv", attention.qkv_proj.weight, both),
            Kernel("rotation", "_rope_to_cache_kernel", BYTES * 2 * rows * both),
            Kernel("attention", "chunk_kernel", BYTES * (cached + 2 * rows * queries)),
            product("o", attention.o_proj.weight, hidden),
            norm(4),
        ]
        if fused:
            found.append(product("gate_up", mlp.gate_up_proj.weight, width, function="linear_swiglu_kernel"))
        else:
            found.append(product("gate_up", mlp.gate_up_proj.weight, 2 * width))
            found.append(Kernel("swiglu", "_forward_kernel", BYTES * 3 * rows * width))
        found.append(product("down", mlp.down_proj.weight, hidden))
    return [*found, norm(4), product("lm_head", step.model.lm_head_weight, vocabulary, 4)]


def read_trace(events: list[dict[str, Any]], step: list[Kernel], replays: int) -> dict[str, dict[str, float]]:
    """From a trace of ``replays`` replays: per kind of kernel, µs from the end of the one before it to its own end (the
    kinds add up to the step, overlapping or not), µs that it ran, and bytes, each of one launch; launches a step.

    Raises:
        ValueError: the trace holds other kernels than ``step``.
    """
    found = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "kernel")
    if len(found) != replays * len(step):
        raise ValueError(f"the trace holds {len(found)} kernels, expected {replays} times {len(step)}")
    rows: dict[str, dict[str, float]] = {}
    before = found[0][0]
    for index, (start, end, name) in enumerate(found):
        kernel = step[index % len(step)]
        if not name.startswith(kernel.function):
            raise ValueError(
                f"kernel {index % len(step)} of a step is {name}, expected {kernel.function} ({kernel.kind})"
            )
        row = rows.setdefault(kernel.kind, {"us": 0.0, "ran_us": 0.0, "bytes": 0.0, "launches": 0.0})
        first = index % len(step) == 0  # what lies between two replays belongs to no kernel
        row["us"] += end - (start if first else before)
        row["ran_us"] += end - start
        row["bytes"] += kernel.read
        row["launches"] += 1
        before = end
    for row in rows.values():
        count = row["launches"]
        row |= {key: row[key] / count for key in ("us", "ran_us", "bytes")} | {"launches": count / replays}
    return rows
