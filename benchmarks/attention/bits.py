"""Compare every output row of every attention path with one packed forward, bit for bit, on this GPU.

python -m benchmarks.attention.bits [--out bits.json] [--seconds 100]

Paths: packed with other tiles, each sequence alone, pages of several sizes with and without parallel chunks, chunked
prefill at random cuts, and decode of every position of every sequence. A pool of processes compiles the variants first;
then --seconds run. Exit code 1 if one bit differs, or if a path was not reached in time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain, islice, pairwise
from multiprocessing import get_context

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.attention.cases import Heads, Packed, Paged, cumulative, packed_case, to_pages
from benchmarks.shared.clock import environment
from benchmarks.shared.options import at_least_one, needs_gpu, out_file
from vexact.ops.kernels.attention import packed_backward
from vexact.ops.kernels.attention.launch import Tile, head_shape, warp_specialised

LENGTHS = [4500, 1, 777, 0, 2048, 2049, 64, 63, 65, 2111, 130]
TILES = [Tile(*t) for t in ((16, 1, 1), (16, 4, 3), (32, 2, 2), (64, 4, 2), (64, 8, 3), (128, 8, 3), (256, 8, 2))]
DECODE_TILES = [Tile(*t) for t in ((16, 1, 2), (16, 2, 3), (16, 4, 4), (16, 8, 2), (32, 4, 3), (64, 4, 2))]
Variant = tuple[str, Callable[[], tuple[Tensor, Tensor]], Tensor]  # name, run, rows of the packed case it repeats


def packed_paths(case: Packed) -> Iterator[Variant]:
    everything = torch.arange(case.q.shape[0], device="cuda")
    for tile in TILES:
        yield f"packed {tile}", partial(case.run, tile), everything
    if warp_specialised("forward", head_shape(case.q, case.k, case.v), case.q.device, True):
        yield "packed, warp-specialised", partial(case.run, specialised=True), everything
    for low, high in pairwise(case.cu.tolist()):
        part = Packed(case.q[low:high], case.k[low:high], case.v[low:high], cumulative([high - low]), [high - low])
        yield f"alone {high - low}", part.run, everything[low:high]


def paged_paths(case: Packed, rng: random.Random) -> Iterator[Variant]:
    everything = torch.arange(case.q.shape[0], device="cuda")
    used = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
    longest = max(case.lengths)
    for page_size, split_rows in ((16, 0), (7, 1), (64, 5), (256, 16), (96, 1)):
        k_cache, v_cache, table = to_pages(case, page_size)
        whole = Paged(case.q, k_cache, v_cache, case.cu, used, table, longest, longest)
        for tile in (TILES[1], TILES[3], TILES[5]) if page_size == 16 else (None,):
            yield f"pages of {page_size} {tile}", partial(whole.run, tile=tile, split_rows=split_rows), everything
        cuts = [rng.randint(0, length) for length in case.lengths]
        starts = case.cu.tolist()
        for first, last in (([0] * len(cuts), cuts), (cuts, case.lengths)):
            spans = list(zip(first, last, strict=True))
            rows = torch.cat([everything[s + a : s + b] for s, (a, b) in zip(starts, spans, strict=False)])
            new = [b - a for a, b in spans]
            keys = torch.tensor([b for _, b in spans], dtype=torch.int32, device="cuda")
            part = Paged(case.q[rows], k_cache, v_cache, cumulative(new), keys, table, max(new), longest)
            yield f"chunked prefill, pages of {page_size}", partial(part.run, split_rows=split_rows), rows
    sequence = torch.repeat_interleave(torch.arange(len(used), device="cuda"), used)
    position = everything - case.cu[sequence.int()]
    for tile in DECODE_TILES:
        steps = Paged(
            case.q, k_cache, v_cache, torch.arange(len(everything) + 1, device="cuda", dtype=torch.int32),
            (position + 1).int(), table[sequence], 1, longest,
        )  # fmt: skip
        yield f"decode {tile}", partial(steps.run, decode_tile=tile), everything


def backward_repeats(case: Packed) -> tuple[int, int]:
    """(rows compared, rows that differ) between two runs of the backward, and between a batch and a sequence alone."""
    out, lse = case.run()
    dout = torch.randn_like(out)
    longest = max(case.lengths)

    def run(low: int, high: int, cu: Tensor) -> tuple[Tensor, ...]:
        rows = (tensor[low:high] for tensor in (dout, case.q, case.k, case.v, out, lse))
        return packed_backward(*rows, cu, cu, longest, longest, case.scale, True)

    whole = run(0, case.q.shape[0], case.cu)
    pairs = list(zip(whole, run(0, case.q.shape[0], case.cu), strict=True))
    for low, high in pairwise(case.cu.tolist()):
        alone = run(low, high, cumulative([high - low]))
        pairs += [(a[low:high], b) for a, b in zip(whole, alone, strict=True)]
    return sum(a[..., 0].numel() for a, _ in pairs), sum(int((a != b).any(-1).sum()) for a, b in pairs)


def variants(seed: int) -> tuple[Packed, Iterator[Variant]]:
    """A case and the paths that must repeat its packed forward."""
    torch.manual_seed(seed)
    case = packed_case(LENGTHS, *CASES[seed])
    return case, chain(packed_paths(case), paged_paths(case, random.Random(seed)))


def compile_variant(seed: int, index: int) -> None:
    """Run one variant so that its kernel is in the cache; index -1 is the backward."""
    case, paths = variants(seed)
    try:
        if index < 0:
            backward_repeats(case)
        else:
            for _, run, _ in islice(paths, index, index + 1):
                run()
    except OutOfResources:
        return


def compare(seed: int, deadline: float) -> dict[str, int]:
    """Rows (token, head) compared and different for one kind of head."""
    case, paths = variants(seed)
    expected, expected_lse = case.run()
    if not torch.isfinite(expected).all():
        raise RuntimeError(f"the packed forward of {CASES[seed]} has rows that are not finite")
    compared = different = skipped = unreached = 0
    for name, run, rows in paths:
        if time.monotonic() > deadline:
            unreached += 1
            continue
        try:
            out, lse = run()
        except OutOfResources:
            skipped += 1
            continue
        wrong = int(((out != expected[rows]).any(-1) | (lse != expected_lse[rows])).sum())
        compared += lse.numel()
        different += wrong
        if wrong:
            print(f"{wrong} of {lse.numel()} rows differ: {CASES[seed]} {name}", flush=True)
    backward_compared, backward_different = backward_repeats(case)
    return {
        "rows_compared": compared,
        "rows_different": different,
        "variants_too_large": skipped,
        "variants_not_reached": unreached,
        "backward_rows_compared": backward_compared,
        "backward_rows_different": backward_different,
    }


CASES = (
    (Heads(16, 8, 128, 128), torch.bfloat16),
    (Heads(16, 8, 128, 128), torch.float16),
    (Heads(9, 3, 64, 64), torch.bfloat16),
    (Heads(4, 2, 96, 96), torch.bfloat16),
    (Heads(8, 1, 192, 128), torch.bfloat16),
    (Heads(16, 16, 192, 128), torch.bfloat16),
    (Heads(4, 4, 136, 128), torch.float16),
    (Heads(4, 4, 80, 40), torch.bfloat16),
    (Heads(4, 2, 256, 256), torch.bfloat16),
    (Heads(4, 2, 64, 64), torch.float32),
    (Heads(4, 4, 24, 16), torch.bfloat16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--cases", type=at_least_one, default=len(CASES))
    args = parser.parse_args()
    needs_gpu(parser)
    started = time.monotonic()
    jobs = [(seed, index) for seed in range(args.cases) for index in range(-1, 40)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_variant, *zip(*jobs, strict=True)))
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    deadline = time.monotonic() + args.seconds
    record: dict = {**environment(), "cases": []}
    for seed, (heads, dtype) in enumerate(CASES[: args.cases]):
        result = compare(seed, deadline)
        record["cases"].append({**asdict(heads), "dtype": str(dtype), **result})
        print(f"{heads} {dtype}: {result}", flush=True)
    sums = ("rows_compared", "rows_different", "backward_rows_compared", "backward_rows_different")
    for key in (*sums, "variants_not_reached"):
        record[key] = sum(case[key] for case in record["cases"])
        print(f"{key}: {record[key]}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if record["variants_not_reached"]:
        sys.exit(f"{record['variants_not_reached']} paths were not reached; --seconds {args.seconds:g} is too short")
    if record["rows_different"] or record["backward_rows_different"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
