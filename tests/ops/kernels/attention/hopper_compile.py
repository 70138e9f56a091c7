"""Compiles the warp-specialised attention kernels for sm_90, without a GPU, and prints one JSON line per binary.

Run as a script in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from vexact.ops.kernels.attention.hopper import host
from vexact.ops.kernels.attention.launch import KEY_BLOCKS, WARP_SPECIALISED, HeadShape

_FLOATS = ("lse", "delta")
_INDICES = ("cu_seqlens_q", "cu_seqlens_k", "counter")
_TENSORS = ("out", "dq", "dk", "dv")
Case = tuple[str, Any, dict[str, int], dict[str, Any]]  # name, kernel, rows of the boxes, constants


def cases(dim: int) -> Iterator[Case]:
    """Every kernel for these heads with the configuration the launchers choose."""
    blocks = KEY_BLOCKS[HeadShape(16, 8, dim, dim, 2).key]
    both = {"GROUP": 2, "D": dim, "DV": dim, "CAUSAL": True, "STEP_Q": dim, "STEP_K": dim, "STEP_V": dim}
    heights = {"q_desc": host.ROWS, "k_desc": host.KEYS_AT_ONCE, "v_desc": host.KEYS_AT_ONCE}
    forward = {"NUM_HEADS": 16, "BLOCK_N": blocks.block_n, "TILE_N": host.KEYS_AT_ONCE, "CHUNK": blocks.chunk}
    yield f"forward {dim}", host.forward_kernel, heights, {**both, **forward, **host.REGISTERS}
    heights = dict.fromkeys(("q_desc", "k_desc", "v_desc", "do_desc"), host.ROWS)
    both["STAGES"] = host.BACKWARD_STAGES
    queries = {"NUM_HEADS": 16, "BLOCK_N": host.ROWS, **host.REGISTERS}
    yield f"queries {dim}", host.queries_kernel, heights, {**both, **queries}
    yield f"keys {dim}", host.keys_kernel, heights, {**both, "KV_HEADS": 8, **host.BACKWARD_KEYS_REGISTERS}


def compile_case(case: Case, dtype: str = "bf16") -> dict[str, Any]:
    """Compile one binary and tell what the assembler says of it."""
    name, kernel, heights, constants = case
    layout = NVMMASharedLayout(128, 16, rank=2)
    types = {name: f"tensordesc<{dtype}[{height}, {constants['D']}],{layout!r}>" for name, height in heights.items()}
    types |= dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_INDICES, "*i32") | dict.fromkeys(_TENSORS, f"*{dtype}")
    types |= {"c": "fp32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {parameter.name: types.get(parameter.name, "i32") for parameter in kernel.params}
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(binary.asm["ptx"])
        command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = [p.name for p in kernel.params if signature[p.name] == "i32"]
    return {
        "name": name,
        "shared": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
        "spilled": sum(int(count) for count in re.findall(r"(\d+) bytes spill", said)),
        "serialised": "serializ" in said,
        "specialised": [p.name for p in kernel.params if p.name in numbers and not p.do_not_specialize],
    }


def main() -> None:
    for _, dim, _ in sorted(WARP_SPECIALISED):
        for case in cases(dim):
            sys.stdout.write(json.dumps(compile_case(case)) + "\n")


if __name__ == "__main__":
    main()
