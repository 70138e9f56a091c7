"""Speed of the attention kernels beside cuDNN, FlashAttention-2 and the memory floor, in one run on this GPU.

python -m benchmarks.attention.speed [--out benchmarks/results/attention_h100.json]

Forward and backward: causal, bf16, 16 query and 8 key/value heads, or Moonlight's 16 and 16 whose keys are 192 wide
and values 128; TFLOP/s count the multiplications and additions of each visible score, 2 per column of keys and of
values, in the backward 6 and 4. Peers are torch's scaled_dot_product_attention with one backend at a time; "-": it does
not take the shape. The last two columns are this project's two families of kernels, where both are there; "ours" is the
one that is chosen. Decode: one token per sequence over pages, in a CUDA graph that rotates among caches so that every
key comes from memory; the floor is the bytes a step must move over the bandwidth of a large streaming kernel in the
same run. Short steps cannot reach it: "read" is the time of a kernel that only reads as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from statistics import median

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.attention.cases import (
    MOONLIGHT,
    QWEN3,
    Heads,
    Packed,
    backward_flops,
    decode_bytes,
    decode_case,
    forward_flops,
    packed_case,
    stock_backward,
    stock_forward,
)
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import needs_gpu, out_file
from vexact.ops.kernels.attention import packed_backward
from vexact.ops.kernels.attention.launch import head_shape, warp_specialised

D64 = Heads(16, 8, 64, 64)
WHOLE = (  # heads, sequences, length
    (QWEN3, 16, 1024),
    (QWEN3, 8, 2048),
    (QWEN3, 4, 4096),
    (QWEN3, 2, 8192),
    (QWEN3, 1, 16384),
    (D64, 2, 8192),
    (MOONLIGHT, 8, 2048),
    (MOONLIGHT, 2, 8192),
)
STEPS = (  # heads, sequences, keys, page size
    *((QWEN3, b, k, 64) for b, k in ((8, 1024), (8, 2048), (8, 4096), (8, 8192), (32, 4096), (64, 2048), (256, 1024))),
    (QWEN3, 1, 32768, 64),
    (QWEN3, 8, 1024, 16),
    (QWEN3, 8, 8192, 16),
    (QWEN3, 256, 1024, 16),
    *((MOONLIGHT, b, k, 64) for b, k in ((1, 8192), (8, 2048), (64, 2048), (256, 1024))),
    (MOONLIGHT, 64, 2048, 16),
)
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}


@triton.jit
def read_kernel(words, sums, count, BLOCK: tl.constexpr):
    """Nothing but reads of words (count,) int32."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(words + offsets, mask=offsets < count, other=0), 0))


def read_us(num_bytes: int, copies: int) -> float:
    """Time to read so many bytes from memory, in a graph that rotates among buffers as the decode rows do."""
    count, block = num_bytes // 4, 8192
    buffers = [torch.zeros(count, dtype=torch.int32, device="cuda") for _ in range(copies)]
    sums = torch.empty(triton.cdiv(count, block), dtype=torch.int32, device="cuda")
    launch = read_kernel[(len(sums),)]
    return median_ms([partial(launch, words, sums, count, BLOCK=block) for words in buffers]) * 1e3


def event_ms(call: Callable[[], object], calls: int = 5, repeats: int = 5) -> float:
    """Median time of a call in a row of calls, by events; autograd's calls cannot be captured in a graph here."""
    for _ in range(calls):
        call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return median(times)


def backward_call(case: Packed, dout: Tensor) -> Callable[..., object]:
    out, lse = case.run()
    longest = max(case.lengths)
    return partial(
        packed_backward, dout, case.q, case.k, case.v, out, lse, case.cu, case.cu, longest, longest, case.scale, True
    )


def has_specialised(case: Packed) -> bool:
    shape = head_shape(case.q, case.k, case.v)
    return all(warp_specialised(name, shape, case.q.device, True) for name in ("forward", "backward"))


def memory_bandwidth() -> float:
    """Bytes per second of the faster of a large copy and a large elementwise kernel, counting reads and writes."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    calls = (partial(target.copy_, source), partial(torch.neg, source, out=target))
    return 2 * source.nbytes / (min(median_ms([call] * 4) for call in calls) * 1e-3)


def measure_whole(heads: Heads, sequences: int, length: int) -> list[dict]:
    """Forward and backward of equally long sequences, ours and the peers'."""
    lengths = [length] * sequences
    case = packed_case(lengths, heads)
    dout = torch.randn(sum(lengths), heads.queries, heads.value_dim, device="cuda", dtype=torch.bfloat16)
    rows = []
    for name, flops, ours, peer in (
        ("forward", forward_flops, case.run, lambda backend: stock_forward(case, backend)),
        ("backward", backward_flops, backward_call(case, dout), lambda backend: stock_backward(case, dout, backend)),
    ):
        work = flops(lengths, heads) / 1e9
        row: dict = {"pass": name, "head_dim": heads.dim, "value_dim": heads.value_dim}
        row |= {"sequences": sequences, "length": length, "tflops": work / event_ms(ours)}
        row["triton_tflops"] = row["specialised_tflops"] = None
        if has_specialised(case):
            for kernels, specialised in (("triton", False), ("specialised", True)):
                row[f"{kernels}_tflops"] = work / event_ms(partial(ours, specialised=specialised))
        for peer_name, backend in PEERS.items():
            row[f"{peer_name}_tflops"] = row[f"over_{peer_name}"] = None
            with suppress(RuntimeError):  # no such kernel
                row[f"{peer_name}_tflops"] = work / event_ms(peer(backend))
                row[f"over_{peer_name}"] = row["tflops"] / row[f"{peer_name}_tflops"]
        rows.append(row)
    return rows


def figure(value: float | None, form: str) -> str:
    """A number as wide as the form says, or a dash."""
    return format(value, form) if value is not None else format("-", f">{form.partition('.')[0]}")


def measure_step(heads: Heads, batch: int, keys: int, page_size: int, bandwidth: float) -> dict:
    """One decode step against the memory floor."""
    count = max(2, min(12, (240 << 20) // (batch * keys * 4096)))
    cases = [decode_case(batch, keys, heads, page_size) for _ in range(count)]
    floor = decode_bytes(cases[0]) / bandwidth * 1e6
    us = median_ms([case.run for case in cases]) * 1e3
    del cases[1:]
    row = {"head_dim": heads.dim, "value_dim": heads.value_dim, "batch": batch, "keys": keys, "page_size": page_size}
    row |= {"us": us, "floor_us": floor, "over_floor": us / floor}
    return row | {"read_us": read_us(decode_bytes(cases[0]), count)}


def compile_job(job: int) -> None:
    """Compile what one row needs, in a process of a pool."""
    if job < len(WHOLE):
        heads, _, length = WHOLE[job]
        case = packed_case([length], heads)
        backward = backward_call(case, torch.randn_like(case.run()[0]))
        for specialised in (False, True):
            case.run(specialised=specialised)
            backward(specialised=specialised)
    else:
        heads, _, keys, page_size = STEPS[job - len(WHOLE)]
        decode_case(1, keys, heads, page_size).run()
    torch.cuda.synchronize()


def run_table() -> dict:
    record: dict = {**environment(), "whole": [], "decode": []}
    print(
        "pass          dim  batch x length     ours  cudnn  flash2 TFLOP/s   ours/cudnn  ours/flash2 triton specialised"
    )
    for heads, sequences, length in WHOLE:
        for row in measure_whole(heads, sequences, length):
            record["whole"].append(row)
            print(
                f"{row['pass']:9s} {heads.dim:3d}/{heads.value_dim:3d} {sequences:4d} x {length:6d}   "
                f"{row['tflops']:6.0f} {figure(row['cudnn_tflops'], '6.0f')} {figure(row['flash2_tflops'], '6.0f')} "
                f"           {figure(row['over_cudnn'], '8.2f')} {figure(row['over_flash2'], '12.2f')}"
                f" {figure(row['triton_tflops'], '6.0f')} {figure(row['specialised_tflops'], '11.0f')}",
                flush=True,
            )
    record["bytes_per_s"] = bandwidth = memory_bandwidth()
    print(f"memory {bandwidth / 1e12:.2f} TB/s\ndecode:     dim  batch x keys  page       us   floor  ratio    read")
    for step in STEPS:
        row = measure_step(*step, bandwidth)
        record["decode"].append(row)
        print(
            f"{row['head_dim']:11d}/{row['value_dim']:3d} {row['batch']:4d} x {row['keys']:6d} {row['page_size']:4d} "
            f"{row['us']:8.1f} {row['floor_us']:7.1f} {row['over_floor']:6.2f} {row['read_us']:7.1f}",
            flush=True,
        )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    needs_gpu(parser)
    torch.manual_seed(0)
    started = time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_job, range(len(WHOLE) + len(STEPS))))
    print(f"compiled in {time.monotonic() - started:.0f} s")
    record = run_table()
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
