"""Compiles the kernels of a decode step as their launchers would, chained and not, without a GPU.

Run as a script in a process without TRITON_INTERPRET, with the folder of ``linear_compile`` on the path:
`python chain_compile.py`. Prints one JSON line per kernel of sm_90: what its code does before it waits for the kernel
before it, and whether its arithmetic is that of the kernel that does not wait.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from linear_compile import FP32, compile_launches, meta
from torch import Tensor

from vexact.ops.kernels import chain, linear, linear_swiglu, rms_norm, swiglu
from vexact.ops.kernels.attention import paged_forward
from vexact.ops.kernels.chain import Chain
from vexact.ops.kernels.linear.tile_table import TUNED
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.rotary import rope_to_cache

ARCH = 90
ROWS = 64
ON = ((chain.LARGE, Chain(overlap=True)),)
EARLY = ((chain.LARGE, Chain(overlap=True, early=True)),)
OFF = ((chain.LARGE, Chain()),)
WAIT, START_NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
# what reads or writes memory that another kernel may know, or leaves the straight line
TOUCHES = re.compile(r"\b(ld\.global|st\.global|ld\.relaxed|cp\.async|red\.|atom\.|bra|ret)")
ARITHMETIC = re.compile(
    r"\b((fma|mul|add|sub|div|max|min|ex2|rsqrt|neg|cvt|mma|wgmma|shfl|set|lg2)\.[\w.]*(f32|f16|b32)[\w.]*)"
)


ROWWISE = ("norm", "residual and norm", "swiglu", "rotation")


def indices(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return meta(*shape, dtype=dtype)


def attend(most_keys: int) -> None:
    caches = [meta(512, 64, 8, 128) for _ in range(2)]
    lengths = indices(ROWS + 1), indices(ROWS), indices(ROWS, most_keys // 64)
    paged_forward(meta(ROWS, 16, 128), *caches, *lengths, 1, most_keys, 0.1, True)


def rotate() -> None:
    q, k, v = meta(ROWS, 32, 128).split((16, 8, 8), dim=1)
    positions, pages = indices(ROWS, dtype=torch.int64), [meta(512, 64, 8, 128) for _ in range(2)]
    norms = meta(128), meta(128), 1e-6
    rope_to_cache.forward(q, k, v, *norms, positions, meta(1024, 128, dtype=FP32), *pages, positions)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that a decode step of a dense model launches between its first and its last product."""
    x, weight = meta(ROWS, 2048), meta(2048)
    yield "norm", lambda: rms_norm.forward(x, weight, 1e-6)
    yield "residual and norm", lambda: rms_norm.add_forward(x, x.clone(), weight, 1e-6)
    yield "swiglu", lambda: swiglu.forward(meta(ROWS, 12288))
    yield "rotation", rotate
    yield "attention in one chunk", lambda: attend(1024)
    yield "attention in chunks", lambda: attend(8192)
    tiles = {tile for key, entries in TUNED.items() if key[0] == "forward" for bound, tile in entries if bound <= 64}
    for tile in sorted(tiles, key=str)[::7] + [tile for tile in tiles if tile.waves]:
        out = meta(ROWS, 2048)
        yield (
            f"product {tile}",
            lambda tile=tile, out=out: linear.matmul(x, meta(2048, 2048), out, layout="forward", tile=tile),
        )
    apart = Tile("tma", 64, 32, 128, 4, 3)  # too deep for one piece of gate and up
    for tile in (linear_swiglu.TILES[0][1], linear_swiglu.TILES[-1][1], apart):
        yield f"product with swiglu {tile}", lambda tile=tile: linear_swiglu.product(x, meta(12288, 2048), tile)


def compiled(launch: Callable[[], Any], steps: tuple[tuple[int, Chain], ...]) -> list[tuple[str, Any]]:
    chain.STEPS = steps
    return compile_launches(ARCH, launch)


def body(ptx: str) -> list[str]:
    """The instructions of the one kernel of a module, in order."""
    return [line.strip() for line in ptx[ptx.index(".entry") :].splitlines() if line.strip()]


def arithmetic(lines: list[str]) -> list[str]:
    """Every instruction on floating point numbers, and on what may hold two of them, without its operands."""
    return [found.group(1) for line in lines if (found := ARITHMETIC.search(line))]


def describe(name: str, kernel: str, early: bool, chained: Any, plain: Any) -> dict[str, Any]:
    lines, other = body(chained.asm["ptx"]), body(plain.asm["ptx"])
    waits = [at for at, line in enumerate(lines) if WAIT in line]
    starts = [at for at, line in enumerate(lines) if START_NEXT in line]
    touches = [at for at, line in enumerate(lines) if not line.startswith("//") and TOUCHES.search(line)]
    return {
        "name": name,
        "kernel": kernel,
        "early": early,
        "waits": len(waits),
        "touches_before_wait": [lines[at] for at in touches if not waits or at < waits[0]],
        "starts_next_after_wait": bool(starts and waits and starts[0] > waits[0]),
        "waits_when_plain": sum(WAIT in line for line in other),
        "same_arithmetic": arithmetic(lines) == arithmetic(other),
        "arithmetic": len(arithmetic(lines)),
        "shared": [chained.metadata.shared, plain.metadata.shared],
        "cubin": len(chained.asm["cubin"]),
    }


if __name__ == "__main__":
    for case, launch_case in cases():
        off = compiled(launch_case, OFF)
        for steps in (ON, EARLY) if case in ROWWISE else (ON,):
            for (kernel_name, with_chain), (_, without) in zip(compiled(launch_case, steps), off, strict=True):
                record = describe(case, kernel_name, steps is EARLY, with_chain, without)
                sys.stdout.write(json.dumps(record) + "\n")
