"""Compiles the linear, log-prob and cross-entropy kernels exactly as their launchers would, without a GPU.

    python tests/ops/kernels/linear/linear_compile.py 80 90 100          # a fixed sample of the tiles: what CI runs
    python tests/ops/kernels/linear/linear_compile.py --all 80 90 100    # every tile of the table

Prints one JSON line per binary. Needs a process without TRITON_INTERPRET: a stand-in for the driver reports the wanted
architecture, tensors live on the meta device, and every launch stops after compilation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vexact.ops.kernels import linear, linear_cross_entropy, logprob
from vexact.ops.kernels.linear import launch as linear_launch
from vexact.ops.kernels.linear.tile_table import TUNED
from vexact.ops.kernels.linear.tiles import FLOAT32_TILES, POINTER_TILES, Layout, Tile
from vexact.ops.kernels.linear_cross_entropy import launch as cross_entropy_launch

BF16, FP32 = torch.bfloat16, torch.float32
SAMPLE_EVERY = 11
BATCHES = (1, 37, 512)  # one binary must serve them all, but that those of small steps are chained


class CompileOnlyDriver:
    """What the launcher asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # binaries are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_launches(arch: int, launch: Callable[[], object]) -> list[tuple[str, Any]]:
    """(kernel name, binary) of everything ``launch`` would start on a GPU of ``arch``."""
    binaries: list[tuple[str, Any]] = []

    def instead_of_launching(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            binaries.append((kernel.fn.__name__, kernel.run(*args, grid=grid, warmup=True, **options)))

        return run

    driver.set_active(CompileOnlyDriver(arch))
    JITFunction.__getitem__ = instead_of_launching
    for module in (linear_launch, cross_entropy_launch):
        module.capability = lambda device: (arch // 10, arch % 10)
    launch()
    return binaries


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def product(layout: Layout, rows: int, tile: Tile, out_dtype: torch.dtype) -> None:
    """One product of a 256 x 256 weight and ``rows`` tokens, as ``layout`` stores it."""
    dtype = FP32 if tile in dict(FLOAT32_TILES).values() else BF16
    a = meta(256, rows, dtype=dtype) if layout == "grad_weight" else meta(rows, 256, dtype=dtype)
    b = meta(rows if layout == "grad_weight" else 256, 256, dtype=dtype)
    if layout == "grad_weight":
        a = meta(rows, 256, dtype=dtype).t()
    b = b if layout == "forward" else b.t()
    bias = meta(256, dtype=dtype) if layout == "forward" else None
    linear.matmul(a, b, meta(a.shape[0], 256, dtype=out_dtype), layout=layout, tile=tile, bias=bias)


def tiles_of(arch: int) -> list[tuple[Layout, Tile]]:
    """Every tile that can run on ``arch``, with each layout it is used in."""
    fixed = [(layout, tile) for _, tile in (*POINTER_TILES, *FLOAT32_TILES) for layout in ("forward", "grad_weight")]
    tuned = [(key[0], tile) for key, entries in TUNED.items() for _, tile in entries] if arch >= 90 else []
    return list(dict.fromkeys((*fixed, *tuned)))


def products(arch: int, everything: bool) -> list[dict[str, Any]]:
    """One record per tile, with the number of binaries that all batches need together."""
    cases, records = tiles_of(arch), []
    for layout, tile in cases if everything else cases[arch // 10 - 8 :: SAMPLE_EVERY]:
        for out_dtype in (BF16, FP32) if everything else (FP32,):

            def launch(layout: Layout = layout, tile: Tile = tile, out_dtype: torch.dtype = out_dtype) -> None:
                for rows in (*BATCHES, 8192):
                    product(layout, rows, tile, out_dtype)

            binaries = compile_launches(arch, launch)
            shared = max(binary.metadata.shared for _, binary in binaries)
            count = len({id(binary) for _, binary in binaries})
            records.append({"name": f"{layout} {tile} {out_dtype}", "arch": arch, "shared": shared, "binaries": count})
    return records


def cross_entropy(arch: int) -> list[dict[str, Any]]:
    """The kernels of the fused cross-entropy and of the log-probs, at a real vocabulary."""
    vocabulary, size = 151936, 256

    def launch() -> None:
        for tokens in BATCHES[1:]:
            rows = [meta(tokens, dtype=dtype) for dtype in (torch.int64, FP32, FP32)]
            hidden, weight = meta(tokens, size), meta(vocabulary, size)
            logprob.token_logprobs(meta(tokens, vocabulary, dtype=FP32), *rows)
            _, lse, entropy = linear_cross_entropy.forward(hidden, weight, *rows)
            linear_cross_entropy.backward(lse, entropy, hidden, weight, *rows, lse, entropy)
            linear_cross_entropy.one_pass(hidden, weight, *rows, lambda values, at: values)

    unique = {id(binary): (name, binary) for name, binary in compile_launches(arch, launch)}
    records: dict[str, dict[str, Any]] = {}
    for name, binary in unique.values():
        record = records.setdefault(name, {"name": name, "arch": arch, "shared": 0, "binaries": 0})
        record["shared"] = max(record["shared"], binary.metadata.shared)
        record["binaries"] += 1
    return list(records.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("archs", type=int, nargs="+")
    arguments = parser.parse_args()
    for one_arch in arguments.archs:
        for line in (*products(one_arch, arguments.all), *cross_entropy(one_arch)):
            sys.stdout.write(json.dumps(line) + "\n")
