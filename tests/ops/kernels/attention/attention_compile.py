"""Compiles the attention kernels ahead of time, without a GPU, and prints one JSON line per binary.

Run as a script in a process without TRITON_INTERPRET: `python attention_compile.py 80 90 100 [--every-shape]`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vexact.ops.kernels.attention import backward, forward, kv_write, split
from vexact.ops.kernels.attention.launch import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    DECODE,
    FORWARD,
    FORWARD_DESCRIBED,
    KEY_BLOCKS,
    MAX_DECODE_ROWS,
    HeadShape,
    key_columns,
    padded,
)

Case = tuple[str, Any, str, dict[str, Any], dict[str, int]]  # name, kernel, dtype, constants, launch options

_STATISTICS = ("lse", "lse2", "delta", "part_acc", "part_ml")
_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "k_cache", "v_cache")
_INDICES = ("cu_seqlens_q", "cu_seqlens_k", "kv_lengths", "table")
_ALIGNED = [["tt.divisibility", 16]]
# Integers that change from batch to batch: a kernel that specialised on one would be compiled again and again.
BATCH_INTEGERS = {"num_sequences", "num_tiles", "num_rows", "num_keys", "num_chunks"}
BATCH_INTEGERS |= {"stride_table", "skip_up_to", "max_rows"}

# dtype, query heads, key/value heads, head dimension, value head dimension
_QWEN3, _SMOLLM2, _FP32 = ("bf16", 16, 8, 128, 128), ("bf16", 9, 3, 64, 64), ("fp32", 4, 2, 64, 64)
_MOONLIGHT = ("bf16", 16, 16, 192, 128)
USUAL = {80: [_QWEN3, _FP32, _MOONLIGHT], 90: [_QWEN3, _SMOLLM2, _MOONLIGHT], 100: [_QWEN3, _MOONLIGHT]}
_DIMS = ((32, 32), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
EVERY = [(dtype, 8, heads, *dims) for dtype in ("bf16", "fp16", "fp32") for heads in (1, 8) for dims in _DIMS]


def cases(shapes: list[tuple[str, int, int, int, int]], thorough: bool, arch: int) -> Iterator[Case]:
    """Every kernel for these heads with the configuration the launchers choose."""
    for dtype, heads, kv_heads, dim, value_dim in shapes:
        shape = HeadShape(heads, kv_heads, dim, value_dim, 4 if dtype == "fp32" else 2)
        name = f"{dtype} {heads}/{kv_heads}x{dim}/{value_dim}"
        sizes = {"D": dim, "DV": value_dim, "D_PAD": shape.dim_pad, "DV_PAD": shape.value_dim_pad}
        both = {"NUM_HEADS": heads, "GROUP": shape.group, **sizes}
        yield from _forward(name, dtype, shape, both, thorough, described=False)
        if arch >= 90 and (dim, value_dim) == (sum(key_columns(dim, value_dim)), shape.value_dim_pad):
            yield from _forward(name, dtype, shape, both, thorough, described=True)
        yield from _backward(name, dtype, shape, both, thorough)
        write = {"PAGE_SIZE": 16, "KV_HEADS": kv_heads, "ROWS": 16, **sizes, "D_PAD": padded(dim)}
        yield f"write {name}", kv_write.write_kernel, dtype, write, {"num_warps": 4}


def _forward(
    name: str, dtype: str, shape: HeadShape, both: dict[str, int], thorough: bool, described: bool
) -> Iterator[Case]:
    """Forward and decode, keys by pointers or through descriptors."""
    blocks, decode = KEY_BLOCKS[shape.key], DECODE[shape.key]
    tile = (FORWARD_DESCRIBED if described else FORWARD)[shape.key]
    steps = {"STEP_K": shape.dim, "STEP_V": shape.value_dim}
    both = {**both, **steps, "BLOCK_N": blocks.block_n, "DESCRIBED": described}
    name = f"{name} {'described' if described else 'pointers'}"
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    page_sizes = (256,) if described else (16, 256)
    for page_size, tile_heads in ((0, 1), *((size, shape.group) for size in page_sizes if thorough)):
        for chunk in (blocks.chunk, 0) if thorough else (blocks.chunk,):
            own = {"PAGE_SIZE": page_size, "TILE_HEADS": tile_heads, "CHUNK": chunk, "BLOCK_M": tile.block_m}
            kind = f"forward pages {page_size} chunk {chunk} {name}"
            yield kind, forward.forward_kernel, dtype, {**both, **own, "CAUSAL": True}, options
    own = {"PAGE_SIZE": page_sizes[0], "TILE_HEADS": shape.group, "CHUNK": blocks.chunk, "CAUSAL": True}
    own |= {"OVERLAP": described, "CHAINED": 0}
    options = {"num_warps": decode.num_warps, "num_stages": decode.num_stages}
    for block_m in (decode.block_m, MAX_DECODE_ROWS) if thorough else (decode.block_m,):
        yield f"chunk m{block_m} {name}", split.chunk_kernel, dtype, {**both, **own, "BLOCK_M": block_m}, options
    merge = {key: both[key] for key in ("NUM_HEADS", "DV", "DV_PAD")} | {"OVERLAP": described, "CHAINED": 0}
    options = {"num_warps": 4, "launch_pdl": described}
    yield f"merge {name}", split.merge_kernel, dtype, {**merge, "CHUNK": blocks.chunk}, options


def _backward(name: str, dtype: str, shape: HeadShape, both: dict[str, int], thorough: bool) -> Iterator[Case]:
    own = {key: both[key] for key in ("NUM_HEADS", "DV", "DV_PAD")}
    yield f"prepare {name}", backward.prepare_kernel, dtype, {**own, "ROWS": 32}, {"num_warps": 4}
    for kind, kernel, table in (
        ("keys", backward.keys_kernel, BACKWARD_KEYS),
        ("queries", backward.queries_kernel, BACKWARD_QUERIES),
    ):
        tile = table[shape.key]
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        for causal in (True, False) if thorough else (True,):
            own = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "CAUSAL": causal}
            yield f"{kind} causal={causal} {name}", kernel, dtype, {**both, **own}, options


def _argument_type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in ("k_desc", "k_rest_desc", "v_desc"):
        first, rest = key_columns(constants["D"], constants["DV"])
        dim = {"k_desc": first, "k_rest_desc": rest, "v_desc": constants["DV"]}[name]
        return f"tensordesc<{dtype}[{constants['BLOCK_N']}, {dim}]>" if constants["DESCRIBED"] else f"*{dtype}"
    if name in _TENSORS:
        return f"*{dtype}"
    if name in _STATISTICS:
        return "*fp32"
    if name in _INDICES:
        return "*i32"
    return {"c": "fp32", "scale": "fp32", "slots": "*i64"}.get(name, "i32")


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    """Compile one binary and describe it."""
    name, kernel, dtype, constants, options = case
    if "DESCRIBED" in constants and not (constants["DESCRIBED"] and constants["D"] > constants["D_PAD"]):
        constants = {**constants, "k_rest_desc": None}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        if parameter.is_constexpr or parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        signature[parameter.name] = _argument_type(parameter.name, dtype, constants)
        if signature[parameter.name].startswith("tensordesc"):
            continue
        if parameter.name not in BATCH_INTEGERS and signature[parameter.name] != "fp32":
            attributes[(index,)] = _ALIGNED
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        "name": name,
        "arch": arch,
        "shared": binary.metadata.shared,
        "cubin": len(binary.asm["cubin"]),
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
        "atomics": bool(re.search(r"\b(atom|red)\.global", binary.asm["ptx"])),
        "specialised": sorted(
            p.name for p in kernel.params if p.name in BATCH_INTEGERS and not p.is_constexpr and not p.do_not_specialize
        ),
    }


def main() -> None:
    thorough = "--every-shape" in sys.argv
    for arch in (int(argument) for argument in sys.argv[1:] if argument.isdigit()):
        for case in cases(EVERY if thorough else USUAL[arch], thorough, arch):
            sys.stdout.write(json.dumps(compile_case(case, arch)) + "\n")


if __name__ == "__main__":
    main()
