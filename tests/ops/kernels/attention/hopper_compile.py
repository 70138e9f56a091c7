"""Compiles the warp-specialised attention kernels for sm_90, without a GPU, and prints one JSON line per binary.

Run as a script in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from vexact.ops.kernels.attention.hopper import forward
from vexact.ops.kernels.attention.launch import KEY_BLOCKS, WARP_SPECIALISED, HeadShape

_TYPES = {"lse": "*fp32", "cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32", "counter": "*i32", "c": "fp32"}


def compile_forward(dim: int, dtype: str, chunk: int, causal: bool) -> dict[str, Any]:
    """Compile one variant and tell what the assembler says of it."""
    blocks = KEY_BLOCKS[HeadShape(16, 8, dim, dim, 2).key]
    constants = {
        "NUM_HEADS": 16, "GROUP": 2, "BLOCK_N": blocks.block_n, "TILE_N": forward.TILE_N, "CHUNK": chunk,
        "D": dim, "DV": dim, "CAUSAL": causal, "STEP_Q": dim, "STEP_K": dim, "STEP_V": dim,
        "CONSUMER_REGISTERS": forward.CONSUMER_REGISTERS, "PRODUCER_REGISTERS": forward.PRODUCER_REGISTERS,
    }  # fmt: skip
    layout = NVMMASharedLayout(128, 16, rank=2)
    heights = {"q_desc": forward.ROWS.value, "k_desc": forward.TILE_N, "v_desc": forward.TILE_N}
    types = {name: f"tensordesc<{dtype}[{height}, {dim}],{layout!r}>" for name, height in heights.items()}
    types |= _TYPES | {"out": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    kernel = forward.forward_kernel
    signature = {parameter.name: types.get(parameter.name, "i32") for parameter in kernel.params}
    pointers = [index for index, name in enumerate(signature) if signature[name].startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(binary.asm["ptx"])
        command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "name": f"forward {dtype} {dim} chunk {chunk} causal {causal}",
        "shared": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
        "spilled": sum(int(count) for count in re.findall(r"(\d+) bytes spill", said)),
        "serialised": "serializ" in said,
    }


def main() -> None:
    for _, dim, _ in sorted(WARP_SPECIALISED):
        for variant in (("bf16", 2048, True), ("bf16", 0, False)):
            sys.stdout.write(json.dumps(compile_forward(dim, *variant)) + "\n")


if __name__ == "__main__":
    main()
