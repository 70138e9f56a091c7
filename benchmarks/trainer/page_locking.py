"""Seconds to page-lock host memory and to give it back, and copies from and to it, beside torch's pinned memory.

    python -m benchmarks.trainer.page_locking --out page_locking_h100.json
    torchrun --nproc-per-node=4 -m benchmarks.trainer.page_locking --gib 16

Peer: ``torch.empty(pin_memory=True)``, in the same process. Exit code 1: a byte came back changed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shared.clock import environment
from benchmarks.shared.options import at_least_one, out_file
from vexact.training.optim.page_locked import page_locked

PIECE = 1 << 30


def torchs(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(allocate: Callable[[int], Tensor], num_bytes: int, values: Tensor) -> dict[str, float]:
    held: list[Tensor] = []
    taken = seconds(lambda: held.append(allocate(num_bytes)))
    assert held[0].is_pinned(), "a copy would wait"
    back = torch.empty_like(values)

    def there() -> None:
        for piece in held[0].split(PIECE):
            piece.copy_(values[: len(piece)], non_blocking=True)

    def home() -> None:
        for piece in held[0].split(PIECE):
            back[: len(piece)].copy_(piece, non_blocking=True)

    out_s, home_s = seconds(there), seconds(home)
    if not torch.equal(back, values):
        raise SystemExit("bytes came back changed")
    given = seconds(held.clear)
    return {
        "allocate_s": round(taken, 3),
        "gib_per_s": round(num_bytes / 2**30 / taken, 2),
        "to_host_gb_per_s": round(num_bytes / 1e9 / out_s, 1),
        "to_gpu_gb_per_s": round(num_bytes / 1e9 / home_s, 1),
        "free_s": round(given, 3),  # torch keeps its own for the next who asks
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=at_least_one, default=8)
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(rank)
    values = torch.randint(256, (PIECE,), dtype=torch.uint8, device="cuda")
    num_bytes = arguments.gib << 30
    report = environment() | {"gib": arguments.gib, "processes": int(os.environ.get("WORLD_SIZE", "1")), "rank": rank}
    report |= {"ours": measured(page_locked, num_bytes, values), "torch": measured(torchs, num_bytes, values)}
    print(json.dumps(report), flush=True)
    if arguments.out is not None and rank == 0:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
