"""A checkpoint: how long training waits for it, at once and in the background, and how long it takes in all.

    python -m benchmarks.trainer.checkpoint --shape qwen3-1.7b --folder DIRECTORY --out checkpoint_h100.json

The state is that of one rank: weights and two moments in fp32. ``waits`` is what a step pays, ``published`` the time
until the checkpoint has its name, ``slowed`` how much longer matrix products take while it is written in the
background. Peer: ``torch.distributed.checkpoint.save`` of the same tensors, which hashes nothing and exports nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.shared.options import out_file
from benchmarks.trainer.audit import SHAPES
from vexact.models import CausalLM, ModelConfig
from vexact.trainer.checkpoint import CheckpointStore, Progress, Saver, ShardWriter, load_checkpoint, verify_checkpoint

State = dict[str, torch.Tensor]


def make_state(config: ModelConfig, device: torch.device) -> State:
    with torch.device("meta"):
        model = CausalLM(config)
    state = {"num_updates": torch.tensor(1)}
    for name, parameter in model.named_parameters():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            state[f"{kind}.{name}"] = torch.rand(parameter.shape, device=device)
        state[f"num_steps.{name}"] = torch.tensor(1)
    return state


def seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(state: State, config: ModelConfig, device: torch.device, folder: Path) -> dict[str, float]:
    store = CheckpointStore(folder, keep_last=1)
    shards = ShardWriter(lambda: state)
    found: dict[str, float] = {}

    def save(saver: Saver, step: int) -> None:
        saver.save(Progress(step, step), config, lambda path: None, {})

    with Saver(store, shards) as saver:
        save(saver, 1)
        found["at once: waits"] = seconds(lambda: save(saver, 2))
    found["verify"] = seconds(lambda: verify_checkpoint(store.path(2)))
    found["load"] = seconds(lambda: load_checkpoint(store.path(2)))
    size = 8192 if device.type == "cuda" else 256
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)

    def work() -> float:
        return seconds(lambda: [a @ a for _ in range(50)])

    alone = min(work() for _ in range(5))
    published: list[float] = []
    with Saver(store, shards, True, lambda path, step: published.append(time.perf_counter())) as saver:
        save(saver, 3)  # locks the host's memory
        saver.finish()
        started = time.perf_counter()
        found["in the background: waits"] = seconds(lambda: save(saver, 4))
        beside = []
        while len(published) < 2:
            beside.append(work())
            saver.poll()
        found["in the background: published"] = published[-1] - started
        found["in the background: slowed"] = sum(beside) / len(beside) / alone - 1
    tensors: dict[str, Any] = {key: tensor for key, tensor in state.items() if tensor.ndim}
    found["torch dcp: waits"] = seconds(lambda: dcp.save(tensors, checkpoint_id=folder / "dcp", no_dist=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; removed at the end")
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    device = torch.device(args.device)
    folder = args.folder or Path(tempfile.mkdtemp())
    config = ModelConfig.from_hf_dict(SHAPES[args.shape][0])
    state = make_state(config, device)
    try:
        times = measure(state, config, device, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {
        "shape": args.shape,
        "bytes": sum(tensor.nbytes for tensor in state.values()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": times,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
