"""Search the launch configurations of the attention kernels on this GPU.

python -m benchmarks.attention.tune --out tune.json [--kinds forward,decode,keys,queries] [--seconds 100]

A pool of processes compiles the candidates first. The winners are copied by hand into
vexact/ops/kernels/attention/launch.py; `benchmarks/attention/bits.py` then proves that bits did not move.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.attention.cases import (
    MOONLIGHT,
    QWEN3,
    Heads,
    Packed,
    backward_flops,
    decode_case,
    forward_flops,
    packed_case,
)
from benchmarks.shared.clock import environment, median_ms
from benchmarks.shared.options import out_file
from vexact.ops.kernels.attention import descriptors, launch, packed_backward
from vexact.ops.kernels.attention.launch import BACKWARD_KEYS, BACKWARD_QUERIES, KeyBlocks, Tile


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration of one kernel. `chunk` and `block_n` are of the key blocks, for forward and decode."""

    kind: str
    tile: Tile
    block_n: int = 64
    chunk: int = 2048
    page_size: int = 64
    heads: Heads = QWEN3
    padded: bool = False  # keys of 192 columns in one tile of 256

    @property
    def blocks(self) -> KeyBlocks:
        return KeyBlocks(self.block_n, self.chunk)


def candidates(kinds: list[str]) -> list[Candidate]:
    """What is worth a compile, best guesses first."""
    found: list[Candidate] = []
    d64, d256 = Heads(16, 8, 64, 64), Heads(16, 8, 256, 256)
    found += latent_candidates(kinds)
    if "forward" in kinds:
        for block_m, warps, stages in ((128, 8, 3), (128, 8, 4), (128, 8, 2), (64, 4, 2), (64, 4, 3)):
            found.append(Candidate("forward", Tile(block_m, warps, stages)))
        found.append(Candidate("forward", Tile(128, 8, 2), block_n=128))
        found += [Candidate("forward", Tile(128, 8, 3), chunk=chunk) for chunk in (1024, 4096, 1 << 20)]
        for block_m, warps, stages, block_n in (
            (128, 8, 3, 64), (128, 8, 3, 128), (64, 4, 3, 64), (64, 4, 3, 128), (64, 4, 2, 128),
        ):  # fmt: skip
            found.append(Candidate("forward", Tile(block_m, warps, stages), block_n=block_n, heads=d64))
        for stages, block_n in ((2, 32), (3, 32), (2, 64)):
            found.append(Candidate("forward", Tile(128, 8, stages), block_n=block_n, heads=d256))
    if "decode" in kinds:
        for warps, stages in ((4, 3), (4, 4), (4, 5), (4, 6), (2, 4), (8, 4), (8, 6)):
            found.append(Candidate("decode", Tile(16, warps, stages)))
        found += [Candidate("decode", Tile(16, 4, 3), page_size=size) for size in (16, 256)]
        found += [Candidate("decode", Tile(16, 4, 3), chunk=chunk) for chunk in (512, 1024)]
        found += [Candidate("decode", Tile(16, 4, 3), chunk=1024, block_n=128, page_size=128)]
    if "keys" in kinds:
        for block_m, warps, stages, block_n in (
            (64, 4, 2, 64), (64, 8, 2, 128), (64, 4, 1, 64), (32, 4, 2, 64), (32, 4, 3, 64), (32, 8, 3, 128),
        ):  # fmt: skip
            found.append(Candidate("keys", Tile(block_m, warps, stages, block_n)))
        found += [
            Candidate("keys", Tile(m, w, 2, n), heads=d64) for m, w, n in ((64, 4, 64), (128, 8, 128), (128, 4, 64))
        ]
    if "queries" in kinds:
        for block_m, warps, stages, block_n in ((128, 8, 3, 64), (128, 8, 4, 64), (128, 8, 4, 32), (64, 4, 2, 32)):
            found.append(Candidate("queries", Tile(block_m, warps, stages, block_n)))
        shapes = ((128, 8, 64), (64, 4, 64), (64, 4, 128))
        found += [Candidate("queries", Tile(m, w, 2, n), heads=d64) for m, w, n in shapes]
    return found


def latent_candidates(kinds: list[str]) -> list[Candidate]:
    """Of keys of 192 columns and values of 128."""
    forward = [(128, 8, 3, 64), (128, 8, 2, 64), (128, 8, 3, 32), (128, 8, 2, 128), (64, 4, 2, 64), (64, 4, 3, 64)]
    tiles = {
        "decode": ((16, 4, 3, 64), (16, 4, 2, 64), (16, 4, 4, 64), (16, 8, 3, 64), (16, 2, 3, 64), (16, 4, 4, 32)),
        "keys": ((64, 8, 2, 64), (64, 8, 1, 64), (32, 4, 2, 64), (32, 8, 2, 128), (64, 8, 1, 128), (64, 4, 1, 64)),
        "queries": ((128, 8, 2, 64), (128, 8, 2, 32), (128, 8, 3, 32), (64, 4, 2, 64), (64, 4, 2, 32)),
    }
    found = []
    if "forward" in kinds:
        found += [Candidate("forward", Tile(m, w, s), block_n=n, heads=MOONLIGHT) for m, w, s, n in forward]
        padded = ((128, 8, 3, 64), (128, 8, 2, 64), (128, 8, 3, 32))
        found += [Candidate("forward", Tile(m, w, s), block_n=n, heads=MOONLIGHT, padded=True) for m, w, s, n in padded]
    if "decode" in kinds:
        found += [Candidate("decode", Tile(m, w, s), block_n=n, heads=MOONLIGHT) for m, w, s, n in tiles["decode"]]
    for kind in ("keys", "queries"):
        if kind in kinds:
            found += [Candidate(kind, Tile(*tile), heads=MOONLIGHT) for tile in tiles[kind]]
    return found


@contextmanager
def columns_of(candidate: Candidate) -> Iterator[None]:
    """Keys in one padded tile where the candidate asks for it."""
    if not candidate.padded:
        yield
        return
    columns = launch.key_columns
    launch.key_columns = descriptors.key_columns = lambda dim, value_dim: (256, 0)
    try:
        yield
    finally:
        launch.key_columns = descriptors.key_columns = columns


def backward_call(case: Packed, candidate: Candidate) -> Callable[[], object]:
    """Only the kernel of interest changes; the other one keeps its configuration, so differences are its own."""
    out, lse = case.run()
    dout = torch.randn_like(out)
    longest = max(case.lengths)
    keys = candidate.tile if candidate.kind == "keys" else BACKWARD_KEYS[2, candidate.heads.dim]
    queries = candidate.tile if candidate.kind == "queries" else BACKWARD_QUERIES[2, candidate.heads.dim]
    return lambda: packed_backward(
        dout, case.q, case.k, case.v, out, lse, case.cu, case.cu, longest, longest, case.scale, True,
        keys_tile=keys, queries_tile=queries,
    )  # fmt: skip


def compile_candidate(candidate: Candidate) -> None:
    """Run it once on small inputs that take the same variant."""
    torch.manual_seed(0)
    try:
        with columns_of(candidate):
            run_once(candidate)
    except OutOfResources:
        return


def run_once(candidate: Candidate) -> None:
    """On small inputs."""
    if candidate.kind == "decode":
        decode_case(2, candidate.chunk + 8, candidate.heads, candidate.page_size).run(
            decode_tile=candidate.tile, key_blocks=candidate.blocks
        )
        return
    case = packed_case([256], candidate.heads)
    if candidate.kind == "forward":
        case.lengths = [candidate.chunk + 1 if candidate.chunk < 1 << 20 else 256]
        case.run(candidate.tile, blocks=candidate.blocks)
    else:
        case.lengths = [8192]
        backward_call(case, candidate)()
    torch.cuda.synchronize()


def measure(candidate: Candidate) -> dict[str, float]:
    """TFLOP/s or GB/s by shape."""
    if candidate.kind == "decode":
        result = {}
        for batch, keys in ((1, 32768), (8, 1024), (8, 8192), (64, 2048), (256, 1024)):
            size = max(1, min(12, (240 << 20) // (batch * keys * 4096)))
            cases = [decode_case(batch, keys, candidate.heads, candidate.page_size) for _ in range(size)]
            options = {"decode_tile": candidate.tile, "key_blocks": candidate.blocks}
            calls = [partial(case.run, **options) for case in cases]
            result[f"{batch}x{keys} us"] = median_ms(calls, target_ms=1.0) * 1e3
        return result
    lengths = [8192, 8192]
    case = packed_case(lengths, candidate.heads)
    if candidate.kind == "forward":
        ms = median_ms([lambda: case.run(candidate.tile, blocks=candidate.blocks)] * 3, target_ms=1.0)
        return {"tflops": forward_flops(lengths, candidate.heads) / ms / 1e9}
    ms = median_ms([backward_call(case, candidate)] * 2, target_ms=1.0)
    return {"tflops": backward_flops(lengths, candidate.heads) / ms / 1e9, "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--kinds", default="forward,decode,keys,queries")
    parser.add_argument("--seconds", type=float, default=100.0)
    args = parser.parse_args()
    started = time.monotonic()
    todo = candidates(args.kinds.split(","))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_candidate, todo))
    print(f"{len(todo)} candidates compiled in {time.monotonic() - started:.0f} s", flush=True)
    record: dict = {**environment(), "results": []}
    for candidate in todo:
        if time.monotonic() - started > args.seconds:
            print("out of time")
            break
        try:
            with columns_of(candidate):
                result = measure(candidate)
        except OutOfResources as error:
            result = {"too large": error.required}
        record["results"].append({**asdict(candidate), **result})
        text = "  ".join(f"{name} {value:.1f}" for name, value in result.items())
        tile, heads = candidate.tile, candidate.heads
        print(
            f"{candidate.kind:8s} d{heads.dim}{' padded' if candidate.padded else ''} m{tile.block_m} "
            f"n{tile.block_n or candidate.block_n} w{tile.num_warps} s{tile.num_stages} "
            f"chunk {candidate.chunk} page {candidate.page_size}: {text}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
