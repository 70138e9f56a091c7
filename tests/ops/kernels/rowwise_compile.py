"""Compiles every row-wise kernel ahead of time, without a GPU, and prints one JSON line per binary.

Run as a script in a process without TRITON_INTERPRET: `python rowwise_compile.py 80 90 100`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vexact.ops.kernels import checksum, rms_norm, square_sums, swiglu
from vexact.ops.kernels.embedding import gather, grad
from vexact.ops.kernels.rotary import latent_rope, qk_norm_rope, rope, rope_to_cache
from vexact.ops.kernels.sampling import draw, threshold
from vexact.ops.kernels.sizes import column_blocks, next_power_of_2

Case = tuple[str, Any, dict[str, str], dict[str, Any]]  # name, kernel, argument types, constants and launch options

_ALIGNMENT = [["tt.divisibility", 16]]


def cases() -> Iterator[Case]:
    """Every kernel at sizes of a 1.7B and a 135M model, with the configuration the launchers choose."""
    for dtype, width in (("bf16", 128), ("bf16", 2048), ("fp16", 576)):
        yield from _rms_norm(dtype, width)
    for dtype, heads in (("bf16", (16, 8, 128)), ("fp32", (9, 3, 80))):
        yield _rope(dtype, *heads)
        yield _qk_norm_rope(dtype, *heads)
        for normed in (False, True):
            yield _rope_to_cache(dtype, *heads, normed)
    yield _latent_rope("bf16", 16, 128, 64, True)
    yield _latent_rope("fp32", 9, 20, 6, False)
    for dtype, width in (("bf16", 6144),):
        yield from _swiglu(dtype, width)
    for dtype, width in (("bf16", 2048),):
        yield from _embedding(dtype, width)
    yield from _sampling()
    for size in (2, 4):
        yield _checksum(size)
    for dtype, width in (("fp32", 1), ("fp32", 576), ("fp32", 2048), ("bf16", 2048)):
        yield _square_sums(dtype, width)


def _rms_norm(dtype: str, width: int) -> Iterator[Case]:
    tensor = f"*{dtype}"
    shared = {"x_ptr": tensor, "weight_ptr": tensor, "rstd_ptr": "*fp32", "num_rows": "i32"}
    forward = {**shared, "residual_ptr": tensor, "y_ptr": tensor, "total_ptr": tensor, "eps": "fp32"}
    for fused in (False, True):
        constants = {"D": width, "HAS_RESIDUAL": fused, "CHAINED": 0, **rms_norm.forward_config(width)}
        yield f"rms_norm forward fused={fused} {dtype} {width}", rms_norm._forward_kernel, forward, constants
    backward = {**shared, "dy_ptr": tensor, "dx_ptr": tensor, "partial_ptr": "*fp32", "rows_per_block": "i32"}
    constants = {"D": width, **rms_norm.backward_config(width)}
    yield f"rms_norm backward {dtype} {width}", rms_norm._backward_kernel, backward, constants
    total = {"partial_ptr": "*fp32", "out_ptr": tensor, "num_partials": "i32"}
    constants = {"D": width, **rms_norm.PARTIAL_CONFIG}
    yield f"rms_norm dweight {dtype} {width}", rms_norm._sum_partials_kernel, total, constants


def _rope(dtype: str, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Case:
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}")
    integers = dict.fromkeys(("q_stride", "k_stride", "num_positions"), "i32")
    types = {**tensors, **integers, "positions_ptr": "*i64", "cos_sin_ptr": "*fp32"}
    constants = {"HQ": num_q_heads, "HKV": num_kv_heads, "HALF": head_dim // 2, "INVERSE": True}
    config = rope.launch_config(num_q_heads, num_kv_heads, head_dim)
    return f"rope {dtype} {num_q_heads}/{num_kv_heads}x{head_dim}", rope._rope_kernel, types, {**constants, **config}


def _latent_rope(dtype: str, num_heads: int, plain: int, rotated: int, interleaved: bool) -> Case:
    tensors = dict.fromkeys(("q_ptr", "k_plain_ptr", "k_rotated_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}")
    integers = dict.fromkeys(
        ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "rotated_stride", "num_positions"), "i32"
    )
    types = {**tensors, **integers, "positions_ptr": "*i64", "cos_sin_ptr": "*fp32"}
    constants = {"HEADS": num_heads, "PLAIN": plain, "HALF": rotated // 2, "INTERLEAVED": interleaved}
    name = f"latent_rope {dtype} {num_heads}x{plain}+{rotated}"
    config = latent_rope.launch_config(plain, rotated)
    return name, latent_rope._latent_rope_kernel, types, {**constants, **config}


def _qk_norm_rope(dtype: str, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Case:
    tensors = ("q_ptr", "k_ptr", "q_weight_ptr", "k_weight_ptr", "q_out_ptr", "k_out_ptr")
    types = {
        **dict.fromkeys(tensors, f"*{dtype}"),
        **dict.fromkeys(("cos_sin_ptr", "q_rstd_ptr", "k_rstd_ptr"), "*fp32"),
        **dict.fromkeys(("q_stride", "k_stride", "num_positions"), "i32"),
        "positions_ptr": "*i64",
        "eps": "fp32",
    }
    constants = {"HQ": num_q_heads, "HKV": num_kv_heads, "HALF": head_dim // 2}
    config = rope.launch_config(num_q_heads, num_kv_heads, head_dim)
    name = f"qk_norm_rope {dtype} {num_q_heads}/{num_kv_heads}x{head_dim}"
    return name, qk_norm_rope._qk_norm_rope_kernel, types, {**constants, **config}


def _rope_to_cache(dtype: str, num_q_heads: int, num_kv_heads: int, head_dim: int, normed: bool) -> Case:
    tensors = ("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "q_out_ptr", "k_cache_ptr", "v_cache_ptr")
    types = {
        **dict.fromkeys(tensors, f"*{dtype}"),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride", "k_page_stride", "k_slot_stride"), "i32"),
        **dict.fromkeys(("v_page_stride", "v_slot_stride", "num_positions"), "i32"),
        **{"positions_ptr": "*i64", "slots_ptr": "*i64", "cos_sin_ptr": "*fp32", "eps": "fp32"},
    }
    constants = {
        **{"PAGE_SIZE": 64, "HQ": num_q_heads, "HKV": num_kv_heads, "HALF": head_dim // 2},
        **{"DV": head_dim, "NORM": normed, "CHAINED": 0, "BLOCK_DV": next_power_of_2(head_dim)},
        **rope.launch_config(num_q_heads, num_kv_heads, head_dim),
    }
    name = f"rope_to_cache {dtype} {num_q_heads}/{num_kv_heads}x{head_dim} norm={normed}"
    return name, rope_to_cache._rope_to_cache_kernel, types, constants


def _swiglu(dtype: str, width: int) -> Iterator[Case]:
    tensor, constants = f"*{dtype}", {"I": width, **column_blocks(width)}
    types = {"gate_up_ptr": tensor, "out_ptr": tensor}
    yield f"swiglu forward {dtype} {width}", swiglu._forward_kernel, types, {**constants, "CHAINED": 0}
    types = {"gate_up_ptr": tensor, "dy_ptr": tensor, "grad_ptr": tensor}
    yield f"swiglu backward {dtype} {width}", swiglu._backward_kernel, types, constants


def _embedding(dtype: str, width: int) -> Iterator[Case]:
    tensor, constants = f"*{dtype}", {"H": width, **column_blocks(width)}
    types = {"ids_ptr": "*i64", "weight_ptr": tensor, "out_ptr": tensor, "num_rows": "i32"}
    yield f"embedding forward {dtype} {width}", gather._forward_kernel, types, constants
    yield from _embedding_grad(dtype, width)


def _embedding_grad(dtype: str, width: int) -> Iterator[Case]:
    tensor = f"*{dtype}"
    types = {"ids_ptr": "*i64", "keys_ptr": "*i32", "named_ptr": "*i8", "num_tokens": "i32", "num_rows": "i32"}
    constants = {"BLOCK": grad._MARK_BLOCK, "num_warps": 4}
    yield "embedding mark", grad._mark_kernel, types, constants
    types = {"named_ptr": "*i8", "out_ptr": tensor, "num_rows": "i32"}
    constants = {"H": width, **grad.zero_config(width)}
    yield f"embedding zeros {dtype} {width}", grad._zero_kernel, types, constants
    runs = {**dict.fromkeys(("keys_ptr", "starts_ptr", "ends_ptr"), "*i32"), "partials_ptr": "*fp32", "out_ptr": tensor}
    types = {**runs, "dy_ptr": tensor, "order_ptr": "*i64"}
    constants = {"H": width, **grad.segment_config(width)}
    yield f"embedding segments {dtype} {width}", grad._segment_kernel, types, constants
    types = {**runs, "num_tokens": "i32"}
    constants = {"H": width, **grad.long_run_config(width)}
    yield f"embedding long runs {dtype} {width}", grad._long_run_kernel, types, constants


def _checksum(size: int) -> Case:
    types = dict.fromkeys(("span_ptr", "owner_ptr", "out_ptr"), "*i64")
    constants = {"BITS": 8 * size, "ALIGNED": True, "STRETCH": checksum._STRETCH, **checksum.CONFIG}
    return f"checksum of {size} bytes", checksum._stretch_kernel, types, constants


def _square_sums(dtype: str, width: int) -> Case:
    types = {"matrix_ptr": "*i64", "owner_ptr": "*i32", "out_ptr": "*fp32"}
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = square_sums.tile(width)
    constants = {"TYPE": square_sums.TYPES[kind], "ALIGNED": width > 1, "WIDE": 16 // kind.itemsize, **config}
    return f"square_sums {dtype} {width}", square_sums._square_sums_kernel, types, constants


def _sampling() -> Iterator[Case]:
    floats = dict.fromkeys(("logits_ptr", "temperature_ptr", "inv_temperature_ptr", "min_logit_ptr"), "*fp32")
    types = {
        **floats,
        "top_k_ptr": "*i32",
        "top_p_ptr": "*fp32",
        "min_p_ptr": "*fp32",
        "vocab_size": "i32",
        "scratch_ptr": "*fp32",
    }
    yield "sampling threshold", threshold._threshold_kernel, types, dict(threshold.THRESHOLD_CONFIG)
    types = {
        **floats,
        "seed_ptr": "*i64",
        "position_ptr": "*i64",
        "best_score_ptr": "*fp32",
        "best_token_ptr": "*i32",
        "vocab_size": "i32",
        "num_chunks": "i32",
    }
    yield "sampling draw", draw._draw_kernel, types, dict(draw.DRAW_CONFIG)
    types = {"best_score_ptr": "*fp32", "best_token_ptr": "*i32", "token_ptr": "*i64", "num_chunks": "i32"}
    yield "sampling choose", draw._choose_kernel, types, {"BLOCK_S": 32, "num_warps": 1}


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    """One binary: its shared memory in bytes, and whether ptx holds a multiplication contracted with an addition."""
    name, kernel, types, constants = case
    options = {"num_warps": constants["num_warps"], "enable_fp_fusion": False}
    constants = {key: value for key, value in constants.items() if key != "num_warps"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): _ALIGNMENT
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = binary.asm["ptx"]
    return {
        "name": name,
        "arch": arch,
        "shared": binary.metadata.shared,
        "contracted": "fma.rn.f32" in ptx,
        "loads_first": ptx.rfind("ld.global") < ptx.find("st.global"),
        "wide_loads": "ld.global.v4" in ptx or "ld.global.v2.b64" in ptx,
        "cubin": len(binary.asm["cubin"]),
    }


if __name__ == "__main__":
    for arch_argument in sys.argv[1:]:
        for one in cases():
            sys.stdout.write(json.dumps(compile_case(one, int(arch_argument))) + "\n")
