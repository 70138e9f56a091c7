"""Checkpoints that are either whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vexact import interrupt
from vexact.audit.certificate import FILE as CERTIFICATE_FILE
from vexact.models import save_hf
from vexact.models.config import ModelConfig
from vexact.training import ActorState

STATE_FILE = "trainer_state.pt"
LATEST = "latest"
_PREFIX = "step_"
_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was there before is untouched."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; data order and sampling are pure functions of it."""

    step: int
    data_cursor: int


class CheckpointStore:
    """``checkpoints/step_N/`` holds the trainer's state, Hugging Face safetensors, tokenizer and certificate."""

    def __init__(self, run_dir: Path, keep_last: int | None) -> None:
        self.directory = run_dir / "checkpoints"
        self.latest_file = run_dir / LATEST
        self.certificate_file = run_dir / CERTIFICATE_FILE
        self.keep_last = keep_last

    def remove_leftovers(self) -> None:
        """Deletes what a killed run left half-written."""
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)

    def latest(self) -> Path | None:
        """The newest complete checkpoint of this run."""
        steps = self._steps()
        return self.directory / f"{_PREFIX}{steps[-1]}" if steps else None

    def save(
        self, progress: Progress, state: ActorState, model: ModelConfig, save_tokenizer: Callable[[Path], Any]
    ) -> Path:
        """Writes one checkpoint and removes those beyond ``keep_last``.

        Raises:
            CheckpointError: the disk is full or not writable; nothing half-written stays behind.
        """
        final = self.directory / f"{_PREFIX}{progress.step}"
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._require_space(state)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            torch.save({"progress": (progress.step, progress.data_cursor), "actor": state}, temporary / STATE_FILE)
            interrupt.check()
            weights = ((name, saved["weight"]) for name, saved in state["parameters"].items())
            save_hf(weights, model, temporary)
            interrupt.check()
            save_tokenizer(temporary)
            if model.eos_token_ids:
                stop = {"eos_token_id": list(model.eos_token_ids)}
                (temporary / "generation_config.json").write_text(json.dumps(stop) + "\n")
            if self.certificate_file.is_file():
                shutil.copy(self.certificate_file, temporary)
            _sync_tree(temporary)
            interrupt.check()
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(self.directory)
            self._point_latest(final)
        except (OSError, RuntimeError) as error:  # torch and safetensors report a failed write as RuntimeError
            raise self._failure(final, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._remove_old()
        return final

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

    def _point_latest(self, final: Path) -> None:
        temporary = self.latest_file.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.write(f"{final.relative_to(self.latest_file.parent)}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.latest_file)

    def _remove_old(self) -> None:
        if self.keep_last is None:
            return
        for step in self._steps()[: -self.keep_last]:
            shutil.rmtree(self.directory / f"{_PREFIX}{step}")

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix(_PREFIX) for path in self.directory.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())


def load_checkpoint(path: Path) -> tuple[Progress, ActorState]:
    """Reads a checkpoint directory.

    Raises:
        CheckpointError: it is missing or not readable.
    """
    file = path / STATE_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint (no {STATE_FILE}); give a checkpoints/step_N directory in "
            "trainer.resume_from_path, or set trainer.resume_mode=disable to start anew"
        )
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; resume from another step_N directory") from error
    return Progress(*saved["progress"]), saved["actor"]


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
