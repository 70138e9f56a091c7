"""Checkpoints that are either whole or absent: written under a temporary name, flushed, hashed, renamed."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from vexact import interrupt
from vexact.audit.certificate import FILE as CERTIFICATE_FILE
from vexact.models import save_hf
from vexact.models.checkpoint.files import sync
from vexact.models.config import ModelConfig
from vexact.trainer.checkpoint import manifest, shard_files
from vexact.trainer.checkpoint.best import BestPointer
from vexact.trainer.checkpoint.error import CheckpointError, write_failure
from vexact.trainer.checkpoint.manifest import Digests, Entry
from vexact.trainer.checkpoint.pointer import FOLDER, LatestPointer
from vexact.trainer.checkpoint.progress import Progress, write_progress
from vexact.trainer.checkpoint.read import IDENTITY_FILE, advice
from vexact.trainer.checkpoint.shard_files import Written
from vexact.trainer.checkpoint.shard_reader import ShardedState

log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_TEMPORARY = ".tmp-"


class CheckpointStore:
    """``checkpoints/step_N/``: the trainer's state in shards, Hugging Face safetensors, tokenizer, certificate, what
    the run is (``identity.json``) and the SHA-256 of all of it (``manifest.json``)."""

    def __init__(self, run_dir: Path, keep_last: int | None, best: BestPointer | None = None) -> None:
        """Keeps ``keep_last`` checkpoints (all with None) and the best one by ``best``."""
        self.directory = run_dir / FOLDER
        self.pointer = LatestPointer(run_dir)
        self.certificate_file = run_dir / CERTIFICATE_FILE
        self.keep_last = keep_last
        self.best = best if best is not None else BestPointer(run_dir, None)
        self._coming: int | None = None  # the step of the checkpoint on its way
        self._ranking = Lock()  # names and ranks change in one thread at a time: metrics come while another publishes

    def remove_leftovers(self) -> None:
        """Finishes or removes what a killed run left half-done."""
        self.pointer.recover()
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            try:
                _remove(path)
            except OSError as error:  # a worker that outlives its driver for a moment may still write into it
                log.warning("could not remove %s, which a killed run left: %s", path, error.strerror)

    def latest(self) -> Path | None:
        """The checkpoint that the run goes on from.

        Raises:
            CheckpointError: ``latest`` names none although there are some. Which one is meant is not guessed.
        """
        try:
            path = self.pointer.read()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {advice(self.directory)}") from error
        if path is None and self.steps():
            raise CheckpointError(
                f"{self.directory} holds checkpoints, but {self.pointer.file} does not exist, so which of them this "
                f"run goes on from is unknown; {advice(self.directory)}"
            )
        return path

    def steps(self, after: int = -1) -> list[int]:
        """Steps above ``after`` of which there is a checkpoint, in order."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(step for match in matches if match is not None and (step := int(match[1])) > after)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step}"

    def begin(
        self,
        progress: Progress,
        save_beside: Callable[[Path], Any],
        identity: Mapping[str, Any] | None = None,
    ) -> Path:
        """Makes the directory that will be the checkpoint, under a name that no earlier life of the run has used, with
        what is small in it, that of ``save_beside`` too; all ranks write into its ``trainer_state``.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        temporary = self.directory / f"{_TEMPORARY}step_{progress.step}-{secrets.token_hex(4)}"
        try:
            (temporary / shard_files.FOLDER).mkdir(parents=True)
            write_progress(temporary, progress)
            save_beside(temporary)
            if self.certificate_file.is_file():
                shutil.copy(self.certificate_file, temporary)
            if identity is not None:
                (temporary / IDENTITY_FILE).write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n")
            interrupt.check()
        except BaseException as error:
            self.discard(temporary)
            if isinstance(error, (OSError, RuntimeError)):
                raise write_failure(self.directory, progress.step, error) from error
            raise
        self._coming = progress.step
        return temporary

    def publish(
        self,
        temporary: Path,
        progress: Progress,
        model: ModelConfig,
        written: Sequence[Written],
        go_on: Callable[[], None] = interrupt.check,
    ) -> Path:
        """Adds what others read and the manifest to what all ranks wrote, gives the checkpoint its name, points
        ``latest`` to it, and removes older ones beyond ``keep_last``.

        Args:
            go_on: called between the parts of this; what it raises ends it, and the checkpoint is not published.

        Raises:
            CheckpointError: a rank's file is not there, or the disk is full or not writable.
        """
        final = self.path(progress.step)
        try:
            known = _entries(temporary, written)
            with Digests(temporary, known) as digests:
                _write_model(temporary, model, go_on)
                digests.begin()
                go_on()
                _sync_tree(temporary)
                manifest.write_manifest(temporary, progress.step, digests.entries())
            sync(temporary / manifest.FILE)
            sync(temporary)
            go_on()
            with self._ranking:
                self._publish(temporary, final)
        except (OSError, RuntimeError) as error:  # torch and safetensors report a failed write as RuntimeError
            raise write_failure(self.directory, progress.step, error) from error
        with self._ranking:
            self._coming = None
            self._remove_old(progress.step)
        return final

    def discard(self, temporary: Path) -> None:
        """Removes what ``begin`` made; nothing where it has become a checkpoint."""
        shutil.rmtree(temporary, ignore_errors=True)

    def note_metrics(self, step: int, metrics: Mapping[str, float], validated: bool) -> None:
        """Ranks the checkpoint of ``step``, published or on its way, by the metrics of its step.

        Raises:
            BestMetricError: ``trainer.best_metric`` is none of them.
        """
        value = self.best.value(metrics, validated)
        if value is None:
            return
        with self._ranking:
            steps = self.steps()
            if step in steps or step == self._coming:
                self.best.note(step, value, steps)
            if step in steps:
                self._remove_old(step)

    def go_on_from(self, step: int | None) -> None:
        """Points ``latest`` to a step that is here, or to none: whoever starts next does not go on from another one."""
        if step is None:
            self.pointer.remove()
        elif not self._is_latest(step):
            self.pointer.point(self.path(step).name)

    def set_aside(self, steps: Sequence[int], number: int) -> Path:
        """Moves checkpoints that the run does not go on from into ``checkpoints.<number>``; returns that directory."""
        place = self.place_aside(number)
        place.mkdir(exist_ok=True)
        for step in steps:
            if self._is_latest(step):
                self.pointer.remove()
            self.path(step).rename(place / self.path(step).name)
        self.best.refresh(self.steps())
        return place

    def place_aside(self, number: int) -> Path:
        """Where checkpoints are set aside: on the disk that holds them, also when ``checkpoints`` is a link."""
        directory = self.directory.resolve()
        if os.path.ismount(directory):
            return directory / f"aside.{number}"
        return directory.with_name(f"{directory.name}.{number}")

    def _publish(self, temporary: Path, final: Path) -> None:
        if final.exists():
            number = next(n for n in count(1) if not self.place_aside(n).exists())
            self.set_aside([int(final.name.removeprefix("step_"))], number)
        self.pointer.announce(final.name)
        try:
            temporary.rename(final)
            sync(self.directory)
        finally:
            self.pointer.recover()

    def _is_latest(self, step: int) -> bool:
        try:
            return self.pointer.read() == self.path(step)
        except CheckpointError:
            return False

    def _remove_old(self, saved: int) -> None:
        """Keeps the checkpoint just saved and those before it, ``keep_last`` in all, and the best one beside them."""
        best = self.best.refresh(self.steps(), self._coming)
        if self.keep_last is None:
            return
        earlier = [step for step in self.steps() if step < saved]
        for step in earlier[: max(0, len(earlier) - (self.keep_last - 1))]:
            if step == best:
                continue
            hidden = self.directory / f"{_TEMPORARY}old-{step}"  # never half a checkpoint under a checkpoint's name
            try:
                self.path(step).rename(hidden)
                _remove(hidden)
            except OSError as error:
                log.warning("could not remove the old checkpoint %s: %s", self.path(step), error.strerror)


def _entries(directory: Path, written: Sequence[Written]) -> dict[str, Entry]:
    """What the manifest says of the ranks' files, each of which is here as its rank reported it."""
    for each in written:
        file = directory / each.name
        size = file.stat().st_size if file.is_file() else None
        if size != each.bytes:
            raise CheckpointError(
                f"rank {each.rank} on {each.host} wrote {each.bytes} bytes of {file}, and here "
                f"{'there is no such file' if size is None else f'it has {size}'}; nothing is saved. Point "
                "trainer.default_local_dir to a disk that all nodes share"
            )
    return {each.name: {"bytes": each.bytes, "sha256": each.sha256} for each in written}


def _write_model(directory: Path, model: ModelConfig, go_on: Callable[[], None]) -> None:
    """The weights as others read them, from what the ranks wrote; no more than one file's worth is in memory."""
    state = ShardedState(directory / shard_files.FOLDER)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for key, stored in state.tensors.items():
            go_on()
            if key.startswith("weight."):
                yield key.removeprefix("weight."), stored.rows(0, stored.shape[0])

    save_hf(weights(), model, directory)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
