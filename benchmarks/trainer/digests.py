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
THREADS, WAITING = 8, 10  # of a rank: tensors hashed at once, and whole tensors on the device at most
PIECE = 1 << 25  # bytes on their way from the device to a thread

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

    def hash_one(name: str, kind: str, whole: Tensor, ready: torch.cuda.Event | None) -> None:
        try:
            found.setdefault(name, {})[kind] = _sha256(whole) if ready is None else _sha256_on_device(whole, ready)
        finally:
            room.release()

    futures = []
    with ThreadPoolExecutor(THREADS) as pool:
        for index, (name, kind, whole) in enumerate(_whole_tensors(actor)):
            if index % actor.ranks.world_size == actor.ranks.rank:
                room.acquire()
                ready = torch.cuda.current_stream(whole.device).record_event() if whole.is_cuda else None
                futures.append(pool.submit(hash_one, name, kind, whole, ready))
            del whole
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
    return hashlib.sha256(_bytes(tensor).numpy()).hexdigest()


def _sha256_on_device(tensor: Tensor, ready: torch.cuda.Event) -> str:
    """Of a tensor that is whole at ``ready``, in pieces on a stream of its own: the other ranks wait for no copy."""
    digest, stream = hashlib.sha256(), torch.cuda.Stream(tensor.device)
    with torch.cuda.stream(stream):  # and on its device, which a new thread has not got
        room = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        ready.wait(stream)
        for piece in _bytes(tensor).split(PIECE):
            room[: len(piece)].copy_(piece, non_blocking=True)
            stream.synchronize()
            digest.update(room[: len(piece)].numpy())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
