"""What one rank does for a checkpoint: writes its own rows, at once or from a copy while training goes on."""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from vexact import interrupt
from vexact.trainer.checkpoint.error import CheckpointError, write_failure
from vexact.trainer.checkpoint.host_copy import HostCopy
from vexact.trainer.checkpoint.shard_files import FOLDER, KINDS, Header, Written, file_name, metadata
from vexact.trainer.checkpoint.tensor_file import Spec, write_tensor_file
from vexact.training import ActorState, local_rows, nonfinite_in, row_range

Values = Iterable[Sequence[Tensor]]  # of every tensor of a file, its bytes in pieces


class AbandonedError(CheckpointError):
    """A save that nobody waits for any more."""


class ShardWriter:
    """Of one process, for the whole run. Every rank makes the same calls; none waits for another."""

    def __init__(self, state: Callable[[], ActorState], rank: int = 0, world_size: int = 1) -> None:
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
        assert self._writing is None, "one save at a time"
        state = self._state()
        checkpoints = directory.parent.parent
        if (found := nonfinite_in(_local(state))) is not None:
            where = f", counted among the rows of rank {self.rank}" if self.world_size > 1 else ""
            raise CheckpointError(f"step {step} is not saved: {found}{where}. Earlier checkpoints are untouched")
        self._stop.clear()
        try:
            if self.rank == 0:
                _require_space(directory, state)
            parts = [_Part(kind, step, state, self.rank) for kind in KINDS if kind == "weight" or _has(state, kind)]
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
        """What the thread wrote; None while it writes. Raises CheckpointError of its failure."""
        assert self._writing is not None, "nothing is being written"
        return self.wait() if self._writing.done() else None

    def wait(self) -> list[Written]:
        """What the thread wrote, once it is done. Raises CheckpointError of its failure."""
        assert self._writing is not None, "nothing is being written"
        writing = self._writing
        try:
            return writing.result()
        finally:
            if writing.done():  # else an interrupt ended the waiting, and ``abandon`` ends the writing
                self._writing = None

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

    def __init__(self, kind: str, step: int, state: ActorState, rank: int) -> None:
        self.kind = kind
        saved: dict[str, Any] = dict(state["parameters"])
        whole: dict[str, Tensor] = {name: parts[kind] for name, parts in saved.items()}
        ranges = {name: _written_rows(tensor, rank) for name, tensor in whole.items()}
        ours = {name: tensor for name, tensor in whole.items() if ranges[name][0] < ranges[name][1]}
        self.tensors = [local_rows(tensor) for tensor in ours.values()]
        self.specs = [
            Spec(f"{kind}/{name}", local.dtype, tuple(local.shape))
            for name, local in zip(ours, self.tensors, strict=True)
        ]
        num_steps = {name: parts["num_steps"] for name, parts in saved.items() if "num_steps" in parts}
        shapes = {name: list(tensor.shape) for name, tensor in whole.items()}
        header = Header(step, state["num_updates"], num_steps, shapes)
        self.metadata = metadata(
            header,
            {f"{kind}/{name}": ranges[name][0] for name in ours},
            {f"{kind}/{name}": tensor.ndim for name, tensor in ours.items()},
        )


def _written_rows(tensor: Tensor, rank: int) -> tuple[int, int]:
    """The rows that ``rank`` writes: its own ones, and on rank 0 all of a tensor that is not split."""
    return row_range(tensor) if isinstance(tensor, DTensor) or rank == 0 else (0, 0)


def _one_by_one(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Copies on the host, each when its turn has come: FSDP cannot resize what NumPy has looked into."""
    for tensor in tensors:
        yield [tensor.to("cpu", copy=True).contiguous()]


def _has(state: ActorState, kind: str) -> bool:
    return any(kind in parts for parts in state["parameters"].values())


def _local(state: ActorState) -> ActorState:
    parameters: Any = {
        name: {key: local_rows(part) if isinstance(part, Tensor) else part for key, part in parts.items()}
        for name, parts in state["parameters"].items()
    }
    return ActorState(num_updates=state["num_updates"], parameters=parameters)


def _require_space(directory: Path, state: ActorState) -> None:
    """Fails early rather than half-way: all ranks' tensors, and the weights once more as safetensors for others."""
    parts = [part for saved in state["parameters"].values() for part in saved.values() if isinstance(part, Tensor)]
    needed = sum(part.nbytes for part in parts) + sum(saved["weight"].nbytes for saved in state["parameters"].values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"the disk is full: a checkpoint needs {needed / 2**20:.0f} MiB")
