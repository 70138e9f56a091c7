"""SHA-256 of all weights and of all moments that a run ends with: on how many GPUs it ran does not show."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore

import torch
from torch import Tensor

from vexact.trainer.checkpoint import load_checkpoint
from vexact.training import Actor
from vexact.training.parallel.ranks import local, unsharded

KINDS = ("weight", "exp_avg", "exp_avg_sq")
THREADS, WAITING = 8, 12  # of a rank: tensors hashed at once, and tensors on the host at most

Hashes = Mapping[str, Mapping[str, str]]
"""SHA-256 of whole tensors, by parameter and by kind."""


def combined(hashes: Hashes) -> dict[str, str]:
    """One digest of all weights and one of all moments."""

    def digest(kinds: tuple[str, ...]) -> str:
        lines = (f"{name} {' '.join(hashes[name][kind] for kind in kinds)}\n" for name in sorted(hashes))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    return {"weights_sha256": digest(KINDS[:1]), "moments_sha256": digest(KINDS[1:])}


def of_checkpoint(directory: Path) -> dict[str, str]:
    """Of the last checkpoint in a run directory."""
    _, state = load_checkpoint(directory / (directory / "latest").read_text().strip())
    parameters = state["parameters"]

    def one(name: str) -> dict[str, str]:
        return {kind: _sha256(parameters[name][kind]) for kind in KINDS}

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return combined(dict(zip(parameters, pool.map(one, parameters), strict=True)))


def share(actor: Actor) -> dict[str, dict[str, str]]:
    """This rank's share of an actor's tensors as they are. All ranks that train call it together."""
    found: dict[str, dict[str, str]] = {}
    room = BoundedSemaphore(WAITING)

    def hash_one(name: str, kind: str, whole: Tensor) -> None:
        try:
            found.setdefault(name, {})[kind] = _sha256(whole)
        finally:
            room.release()

    futures = []
    with ThreadPoolExecutor(THREADS) as pool:
        for index, (name, kind, whole) in enumerate(_whole_tensors(actor)):
            if index % actor.ranks.world_size == actor.ranks.rank:
                room.acquire()
                futures.append(pool.submit(hash_one, name, kind, whole.cpu()))
    for future in futures:
        future.result()
    return found


def _whole_tensors(actor: Actor) -> Iterator[tuple[str, str, Tensor]]:
    """Each gathered on the device when its turn has come."""
    parameters = dict(actor.model.named_parameters())
    for key, value in actor.sharded_state().items():
        kind, _, name = key.partition(".")
        if kind in KINDS:
            rows = local(value).to(actor.ranks.device)
            yield name, kind, unsharded(actor.ranks.sharded(rows, parameters[name]))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
