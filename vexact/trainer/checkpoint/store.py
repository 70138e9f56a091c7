"""Checkpoints that are either whole or absent: written under a temporary name, flushed, hashed, renamed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from vexact import interrupt
from vexact.audit.certificate import FILE as CERTIFICATE_FILE
from vexact.models import save_hf
from vexact.models.checkpoint.files import sync
from vexact.models.config import ModelConfig
from vexact.trainer.checkpoint import manifest, state_file
from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.manifest import Digests
from vexact.trainer.checkpoint.pointer import FOLDER, LatestPointer
from vexact.trainer.checkpoint.read import IDENTITY_FILE, advice
from vexact.trainer.checkpoint.state_file import Progress
from vexact.training import ActorState, nonfinite_in

log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_TEMPORARY = ".tmp-"


class CheckpointStore:
    """``checkpoints/step_N/``: the trainer's state, Hugging Face safetensors, tokenizer, certificate, what the run is
    (``identity.json``) and the SHA-256 of all of it (``manifest.json``)."""

    def __init__(self, run_dir: Path, keep_last: int | None) -> None:
        self.directory = run_dir / FOLDER
        self.pointer = LatestPointer(run_dir)
        self.certificate_file = run_dir / CERTIFICATE_FILE
        self.keep_last = keep_last

    def remove_leftovers(self) -> None:
        """Finishes or removes what a killed run left half-done."""
        self.pointer.recover()
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            _remove(path)

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

    def save(
        self,
        progress: Progress,
        state: ActorState,
        model: ModelConfig,
        save_tokenizer: Callable[[Path], Any],
        identity: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes one checkpoint, points ``latest`` to it and removes older ones beyond ``keep_last``.

        Raises:
            CheckpointError: the disk is full or not writable, or the state is not finite; nothing half-written stays
                behind, and earlier checkpoints are untouched.
        """
        if (found := nonfinite_in(state)) is not None:
            raise CheckpointError(f"step {progress.step} is not saved: {found}. Earlier checkpoints are untouched")
        final = self.path(progress.step)
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._require_space(state)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            with Digests(temporary) as digests:
                state_file.write_state(temporary / state_file.FILE, progress, state)
                digests.begin()
                interrupt.check()
                self._write_model(temporary, state, model, save_tokenizer)
                if identity is not None:
                    (temporary / IDENTITY_FILE).write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n")
                digests.begin()
                interrupt.check()
                _sync_tree(temporary)
                manifest.write_manifest(temporary, progress.step, digests.entries())
            sync(temporary / manifest.FILE)
            sync(temporary)
            interrupt.check()
            self._publish(temporary, final)
        except (OSError, RuntimeError) as error:  # torch and safetensors report a failed write as RuntimeError
            raise self._failure(final, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._remove_old(progress.step)
        return final

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

    def _write_model(
        self, directory: Path, state: ActorState, model: ModelConfig, save_tokenizer: Callable[[Path], Any]
    ) -> None:
        """What others read: safetensors, configuration and tokenizer in Hugging Face's layout, and the certificate."""
        weights = ((name, saved["weight"]) for name, saved in state["parameters"].items())
        save_hf(weights, model, directory)
        save_tokenizer(directory)
        if self.certificate_file.is_file():
            shutil.copy(self.certificate_file, directory)

    def _failure(self, final: Path, error: Exception) -> CheckpointError:
        free = shutil.disk_usage(self.directory if self.directory.is_dir() else Path.cwd()).free
        return CheckpointError(
            f"could not write {final}: {str(error).splitlines()[0]} ({free / 2**20:.0f} MiB free). Earlier checkpoints "
            "are untouched. Free some space, lower trainer.keep_last, or point trainer.default_local_dir to another "
            "disk; the run then resumes from the last checkpoint"
        )

    def _require_space(self, state: ActorState) -> None:
        """Fails early rather than half-way; fp32 weights once in the state, once as safetensors, and two moments."""
        tensors = [t for saved in state["parameters"].values() for t in saved.values() if isinstance(t, torch.Tensor)]
        weights = sum(saved["weight"].nbytes for saved in state["parameters"].values())
        needed = sum(t.nbytes for t in tensors) + weights
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"the disk is full: a checkpoint needs {needed / 2**20:.0f} MiB")

    def _remove_old(self, saved: int) -> None:
        """Keeps the checkpoint just saved and those before it, ``keep_last`` in all."""
        if self.keep_last is None:
            return
        earlier = [step for step in self.steps() if step < saved]
        for step in earlier[: max(0, len(earlier) - (self.keep_last - 1))]:
            hidden = self.directory / f"{_TEMPORARY}old-{step}"  # never half a checkpoint under a checkpoint's name
            try:
                self.path(step).rename(hidden)
                _remove(hidden)
            except OSError as error:
                log.warning("could not remove the old checkpoint %s: %s", self.path(step), error.strerror)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
