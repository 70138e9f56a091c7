"""Compiles the kernels of the mixture of experts exactly as their launchers would, without a GPU.

Run as a script in a process without TRITON_INTERPRET, with the folder of ``linear_compile`` on the path:
`python moe_compile.py 80 90 100`. Prints one JSON line per kernel and configuration.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from linear_compile import BF16, FP32, compile_launches, meta
from torch import Tensor

from vexact.ops.kernels.moe import combine, few, grouped_linear, groups, router, tiles

TOKENS = (1, 37, 512, 20000)  # one binary must serve them all
TINY = (4, 2, "softmax", 1, 1, True, 1.0, BF16)
QWEN3 = (128, 8, "softmax", 1, 1, True, 1.0, BF16)
MOONLIGHT = (64, 6, "sigmoid", 1, 1, True, 2.446, FP32)
DEEPSEEK_V3 = (256, 8, "sigmoid", 8, 4, True, 2.5, FP32)


def integers(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def routing(model: tuple[Any, ...], tokens: int) -> None:
    experts, top_k, scoring, _, _, normalize, scale, _ = model
    logits, bias, chosen = meta(tokens, experts, dtype=FP32), meta(experts, dtype=FP32), integers(tokens, top_k)
    router.forward(logits, bias, meta(tokens, dtype=torch.int64), *model[1:], 3)
    router.backward(meta(tokens, top_k, dtype=FP32), logits, chosen, top_k, scoring, normalize, scale)
    groups.forward(chosen, experts)


def routing_in_one_launch(model: tuple[Any, ...], tokens: int) -> None:
    """A step of decoding; few tokens are not padded, and 16 are ranked by two programs."""
    bias = meta(model[0], dtype=FP32) if model[2] == "sigmoid" else None
    padding = meta(tokens, dtype=torch.bool) if tokens > 2 else None
    digest = meta(tokens, dtype=torch.int64)
    router.grouped_forward(meta(tokens, model[0], dtype=FP32), bias, digest, padding, *model[1:], 3)


def in_two_launches(model: tuple[Any, ...], tiles: tuple[Any, Any], tokens: int) -> None:
    """Up to a few tokens, whatever the batch; with a shared expert where there is a bias."""
    tokens, experts = min(tokens, few.TOKENS), model[0]
    bias = meta(experts, dtype=FP32) if model[2] == "sigmoid" else None
    x, digest = meta(tokens, 2048), meta(tokens, dtype=torch.int64)
    logits, padding = meta(tokens, experts, dtype=FP32), meta(tokens, dtype=torch.bool)
    matrices = meta(experts, 1536, 2048), meta(experts, 2048, 768)
    shared = None if bias is None else x
    sizes = {"gated_tile": tiles[0], "down_tile": tiles[1]}
    few.forward(x, logits, bias, digest, padding, *matrices, shared, *model[1:], 3, **sizes)


def combining(dtype: torch.dtype, tokens: int) -> None:
    y, weights, slots = meta(tokens * 8, 2048, dtype=dtype), meta(tokens, 8, dtype=FP32), integers(tokens, 8)
    one = meta(tokens, 2048, dtype=dtype)
    combine.forward(y, weights, slots, one)
    combine.total(y, slots)
    combine.backward(one, y, weights, slots)


def product(tile: tiles.Tile, gated: bool, gather: bool, transposed: bool, tokens: int) -> None:
    dtype = FP32 if tile in dict(tiles.FLOAT32).values() else BF16
    x = meta(tokens if gather else tokens * 8, 2048, dtype=dtype)
    weight = meta(128, 2048, 1536, dtype=dtype).transpose(1, 2) if transposed else meta(128, 1536, 2048, dtype=dtype)
    rows = integers(tokens * 8) if gather else None
    grouped_linear.product(x, weight, rows, integers(129), 8, gated=gated, tile=tile)


def grad_weight(tile: tiles.Tile, gather: bool, ranks: int, tokens: int) -> None:
    dtype = FP32 if tile == tiles.FLOAT32_GRAD_WEIGHT else BF16
    x, rows = meta(tokens if gather else tokens * 8, 2048, dtype=dtype), integers(tokens * 8) if gather else None
    grouped_linear.grad_weight(meta(tokens * 8, 1536, dtype=dtype), x, rows, integers(129), 8, ranks, tile=tile)


def add_grad_weight(tile: tiles.Tile, fresh: bool, tokens: int) -> None:
    dtype = FP32 if tile == tiles.FLOAT32_GRAD_WEIGHT else BF16
    dy, x = meta(tokens * 8, 1536, dtype=dtype), meta(tokens * 8, 2048, dtype=dtype)
    total = meta(32, 1536, 2048, dtype=FP32)
    for counted in (1, 3, 4):
        grouped_linear.add_grad_weight(total, dy, x, integers(129), 4, counted, fresh, tile=tile)


def cases(arch: int) -> Iterator[tuple[str, Callable[[int], None]]]:
    """Name and launch, given the number of tokens: all tiles of sm_90, a few of the newest."""
    for name, model in (("qwen3", QWEN3), ("deepseek-v3", DEEPSEEK_V3))[: 2 if arch == 90 else 1]:
        yield f"routing {name}", lambda tokens, model=model: routing(model, tokens)
    for model in (TINY, MOONLIGHT, DEEPSEEK_V3, QWEN3)[: 4 if arch == 90 else 2]:
        for rows in (1, 2, 8) if model is TINY else (1, 16):  # small tiles take other ways through the compiler
            one = model, rows
            yield f"routing in one launch {one}", lambda tokens, one=one: routing_in_one_launch(*one)
    for model in (QWEN3, DEEPSEEK_V3)[: 2 if arch == 90 else 1]:
        one = model, (few.GATED_TILES[0], few.DOWN_TILES[0])
        yield f"in two launches {one}", lambda tokens, one=one: in_two_launches(*one, tokens)
    for dtype in (BF16, FP32)[: 2 if arch == 90 else 1]:
        yield f"combining {dtype}", lambda tokens, dtype=dtype: combining(dtype, tokens)
    first = -1 if arch > 90 else 0
    plain = (*tiles.POINTER[first:], *tiles.FLOAT32[first:])
    if arch >= 90:
        plain += (*tiles.GATHERED[first:], tiles.FORWARD[-1])
    for tile in dict.fromkeys(tile for _, tile in plain):
        yield f"product {tile}", lambda tokens, one=(tile, False, True, False): product(*one, tokens)
    for _, tile in (tiles.GATED if arch >= 90 else tiles.POINTER)[first:]:
        yield f"gated product {tile}", lambda tokens, one=(tile, True, True, False): product(*one, tokens)
    if arch >= 90:
        tile = tiles.FORWARD[-1][1]
        yield f"grad_input {tile}", lambda tokens, one=(tile, False, False, True): product(*one, tokens)
    sums = (tiles.GRAD_WEIGHT,) if arch >= 90 else (tiles.POINTER_GRAD_WEIGHT, tiles.FLOAT32_GRAD_WEIGHT)
    for tile in sums:
        for gather in (True, False):
            yield f"grad_weight {gather} {tile}", lambda tokens, one=(tile, gather, 1): grad_weight(*one, tokens)
        yield f"grad_weight by rank {tile}", lambda tokens, one=(tile, False, 4): grad_weight(*one, tokens)
    for tile in (tiles.GRAD_WEIGHT_SUM,) if arch >= 90 else sums:
        for fresh in (True, False):
            yield f"sum of gradients {fresh} {tile}", lambda tokens, one=(tile, fresh): add_grad_weight(*one, tokens)


def records(arch: int) -> Iterator[dict[str, Any]]:
    """Per case and kernel: the largest shared memory, the number of binaries, and what the code contains."""
    grouped_linear.capability = lambda device: (arch // 10, arch % 10)
    few.overlaps = lambda device: arch >= 90
    for name, launch in cases(arch):

        def every_batch(launch: Callable[[int], None] = launch) -> None:
            for tokens in TOKENS:
                launch(tokens)

        by_kernel: dict[str, dict[int, Any]] = {}
        for kernel, binary in compile_launches(arch, every_batch):
            by_kernel.setdefault(kernel, {})[id(binary)] = binary
        for kernel, binaries in by_kernel.items():
            ptx = "".join(binary.asm["ptx"] for binary in binaries.values())
            yield {
                "name": name,
                "kernel": kernel,
                "shared": max(binary.metadata.shared for binary in binaries.values()),
                "binaries": len(binaries),
                "wgmma": "wgmma.mma_async" in ptx,
                "atomics": bool(re.search(r"\b(atom|red)\.global", ptx)),
                "contracted": "fma.rn.f32" in ptx,
            }


if __name__ == "__main__":
    for one_arch in sys.argv[1:]:
        for record in records(int(one_arch)):
            sys.stdout.write(json.dumps(record) + "\n")
