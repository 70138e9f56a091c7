"""Compiles the warp-specialised attention kernels for sm_90, without a GPU, and prints one JSON line per binary.

Run as a script in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from vexact.ops.kernels.attention.hopper import host
from vexact.ops.kernels.attention.launch import KEY_BLOCKS, WARP_SPECIALISED, HeadShape, key_columns

# Packed rows (0) and pages: one box a tile needs nothing of its own, several do, and pages that no tile divides.
PAGE_SIZES = {64: (0,), 128: (0, 16, 48), 192: (0, 16), 256: (0, 16)}
_FLOATS = ("lse", "delta", "run")
_INDICES = ("cu_seqlens_q", "cu_seqlens_k", "kv_lengths", "table", "counter")
_TENSORS = ("out", "dq", "dk", "dv")
Case = tuple[str, Any, dict[str, tuple[int, int]], dict[str, Any]]  # name, kernel, boxes, constants


def constants_of(shape: HeadShape) -> dict[str, Any]:
    steps = {"STEP_Q": shape.dim, "STEP_K": shape.dim, "STEP_V": shape.value_dim}
    return {"GROUP": shape.group, "D": shape.dim, "DV": shape.value_dim, "CAUSAL": True, **steps}


def forward_cases(shape: HeadShape, page_sizes: tuple[int, ...]) -> Iterator[Case]:
    """The forward with the configuration the launcher chooses, packed (page size 0) and over pages."""
    tile, blocks = host.FORWARD_TILES[shape.key], KEY_BLOCKS[shape.key]
    first, rest = key_columns(shape.dim, shape.value_dim)
    constants = {**constants_of(shape), "NUM_HEADS": shape.num_heads, "RUN_SHARED": tile.run_shared}
    constants |= {"BLOCK_N": blocks.block_n, "TILE_N": tile.keys, "CHUNK": blocks.chunk, "D_PAD": first}
    constants |= {"run": None} if tile.run_shared else {}
    constants |= {} if rest else {"q_rest_desc": None, "k_rest_desc": None}
    for page_size in page_sizes:
        height = host.box_height(page_size, tile.keys)
        boxes = {"q_desc": (host.ROWS, first), "k_desc": (height, first), "v_desc": (height, shape.value_dim)}
        boxes |= {"q_rest_desc": (host.ROWS, rest), "k_rest_desc": (height, rest)} if rest else {}
        name = f"forward {shape.dim}" + (f" pages {page_size}" if page_size else "")
        constants |= {**tile.registers(height), "PAGE_SIZE": page_size}
        yield name, host.forward_kernel, boxes, dict(constants)
    if not tile.run_shared:
        yield f"{name} one chunk", host.forward_kernel, boxes, {**constants, "CHUNK": 0, "run": None}


def compile_case(case: Case, dtype: str = "bf16") -> dict[str, Any]:
    """Compile one binary and tell what the assembler says of it."""
    name, kernel, boxes, constants = case
    layout = NVMMASharedLayout(128, 16, rank=2)
    types = {name: f"tensordesc<{dtype}[{rows}, {columns}],{layout!r}>" for name, (rows, columns) in boxes.items()}
    types |= dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_INDICES, "*i32") | dict.fromkeys(_TENSORS, f"*{dtype}")
    types |= {"c": "fp32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {parameter.name: types.get(parameter.name, "i32") for parameter in kernel.params}
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    said = printed.getvalue()
    assert "bytes spill" in said, "Triton came from its cache, or its assembler says nothing"
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
    cases = []
    for element_bytes, dim, value_dim in sorted(WARP_SPECIALISED["forward"]):
        shape = HeadShape(16, 8, dim, value_dim, element_bytes)
        cases += forward_cases(shape, PAGE_SIZES.get(dim, (0,)))
    only = sys.argv[1:]
    for case in cases:
        if not only or any(case[0].startswith(name) for name in only):
            sys.stdout.write(json.dumps(compile_case(case)) + "\n")


if __name__ == "__main__":
    main()
