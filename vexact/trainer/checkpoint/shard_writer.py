"""What one rank does for a checkpoint: writes its own rows, at once or from a copy while training goes on."""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

from torch import Tensor
from torch.distributed.tensor import DTensor

from vexact import interrupt
from vexact.models.nonfinite import find_nonfinite
from vexact.trainer.checkpoint.error import CheckpointError, write_failure
from vexact.trainer.checkpoint.host_copy import HostCopy
from vexact.trainer.checkpoint.shard_files import FOLDER, KINDS, Header, Written, file_name, metadata, row_range
from vexact.trainer.checkpoint.tensor_file import Spec, write_tensor_file
from vexact.training.parallel.ranks import local

State = Mapping[str, Tensor]  # as ``Actor.sharded_state`` gives it
Values = Iterable[Sequence[Tensor]]  # of every tensor of a file, its bytes in pieces


class AbandonedError(CheckpointError):
    """A save that nobody waits for any more."""


class ShardWriter:
    """Of one process, for the whole run. Every rank makes the same calls; none waits for another."""

    def __init__(self, state: Callable[[], State], rank: int = 0, world_size: int = 1) -> None:
        """``state`` gives the live state: DTensors of which this rank holds some rows, or whole tensors, which rank 0
        writes."""
        self._state, self.rank, self.world_size = state, rank, world_size
        self._copy, self._stop = HostCopy(), Event()
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[list[Written]] | None = None

    def save(self, step: int, directory: Path, background: bool = False) -> list[Written] | None:
        """Writes this rank's files into ``directory``, which all ranks share.

        With ``background`` it returns None once the state is copied to the host (on a GPU: once the copy is in the
        stream), and a thread writes what the state was then.

        Raises:
            CheckpointError: the state is not finite, or the disk is full or not writable.
        """
        assert self._writing is None or self._writing.done(), "one save at a time"
        state = self._state()
        checkpoints = directory.parent.parent
        if (found := _nonfinite(state)) is not None:
            where = f", counted among the rows of rank {self.rank}" if self.world_size > 1 else ""
            raise CheckpointError(f"step {step} is not saved: {found}{where}. Earlier checkpoints are untouched")
        self._stop.clear()
        try:
            if self.rank == 0:
                _require_space(directory, state)
            parts = [_Part(kind, step, state, self.rank) for kind in KINDS if _has(state, kind)]
            if not background:
                return [self._write(part, _one_by_one(part.tensors), directory) for part in parts]
            pieces = iter(self._copy.take(tensor for part in parts for tensor in part.tensors))
            values = [[next(pieces) for _ in part.tensors] for part in parts]
        except (OSError, RuntimeError) as error:  # torch reports what it cannot do as RuntimeError
            raise write_failure(checkpoints, step, error) from error
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._pool.submit(self._write_all, parts, values, directory, checkpoints, step)
        return None

    def poll(self) -> list[Written] | None:
        """What the thread wrote last, as often as it is asked: others may still write. None while it writes. Raises
        CheckpointError of its failure."""
        assert self._writing is not None, "nothing was written"
        return self.wait() if self._writing.done() else None

    def wait(self) -> list[Written]:
        """What the thread wrote last, once it is done. Raises CheckpointError of its failure."""
        assert self._writing is not None, "nothing was written"
        return self._writing.result()

    def abandon(self) -> None:
        """Ends the thread's writing within a moment. What is written stays where it is."""
        self._stop.set()
        writing, self._writing = self._writing, None
        if writing is not None:
            with suppress(Exception, KeyboardInterrupt):
                writing.result()

    def _write_all(
        self, parts: list[_Part], values: Sequence[Values], directory: Path, checkpoints: Path, step: int
    ) -> list[Written]:
        try:
            self._copy.wait()
            return [self._write(part, each, directory) for part, each in zip(parts, values, strict=True)]
        except (OSError, RuntimeError) as error:
            raise write_failure(checkpoints, step, error) from error

    def _write(self, part: _Part, values: Values, directory: Path) -> Written:
        name = file_name(part.kind, self.rank, self.world_size)
        size, sha256 = write_tensor_file(directory / name, part.specs, values, part.metadata, self._go_on)
        return Written(f"{FOLDER}/{name}", self.rank, socket.gethostname(), size, sha256)

    def _go_on(self) -> None:
        interrupt.check()
        if self._stop.is_set():
            raise AbandonedError("the save was abandoned")


class _Part:
    """One file to be: this rank's rows of one kind of tensor."""

    def __init__(self, kind: str, step: int, state: State, rank: int) -> None:
        self.kind = kind
        whole = {key: tensor for key, tensor in state.items() if key.startswith(f"{kind}.")}
        ranges = {key: _written_rows(tensor, rank) for key, tensor in whole.items()}
        ours = {key: tensor for key, tensor in whole.items() if ranges[key][0] < ranges[key][1]}
        self.tensors = [local(tensor) for tensor in ours.values()]
        self.specs = [Spec(key, rows.dtype, tuple(rows.shape)) for key, rows in zip(ours, self.tensors, strict=True)]
        shapes = {_name(key): list(tensor.shape) for key, tensor in whole.items()}
        num_steps = {_name(key): int(count) for key, count in state.items() if key.startswith("num_steps.")}
        header = Header(step, int(state["num_updates"]), num_steps, shapes)
        first_rows = {key: ranges[key][0] for key in ours}
        self.metadata = metadata(header, first_rows, {key: tensor.ndim for key, tensor in ours.items()})


def _written_rows(tensor: Tensor, rank: int) -> tuple[int, int]:
    """The rows that ``rank`` writes: its own ones, and on rank 0 all of a tensor that is not split."""
    return row_range(tensor) if isinstance(tensor, DTensor) or rank == 0 else (0, 0)


def _one_by_one(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Copies on the host, each when its turn has come: FSDP cannot resize what NumPy has looked into."""
    for tensor in tensors:
        yield [tensor.to("cpu", copy=True).contiguous()]


def _has(state: State, kind: str) -> bool:
    return kind == "weight" or any(key.startswith(f"{kind}.") for key in state)


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """Weights and moments by key."""
    return ((key, tensor) for key, tensor in state.items() if key.startswith(tuple(f"{kind}." for kind in KINDS)))


def _name(key: str) -> str:
    """Of the parameter that a key is about."""
    return key.partition(".")[2]


def _nonfinite(state: State) -> str | None:
    """Such a state must never take the place of a healthy checkpoint."""
    return find_nonfinite(
        (_name(key) if key.startswith("weight.") else key.replace(".", " of ", 1), local(tensor))
        for key, tensor in _tensors(state)
    )


def _require_space(directory: Path, state: State) -> None:
    """Fails early rather than half-way: all ranks' tensors, and the weights once more as safetensors for others."""
    needed = sum(tensor.nbytes * (2 if key.startswith("weight.") else 1) for key, tensor in _tensors(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"the disk is full: a checkpoint needs {needed / 2**20:.0f} MiB")
