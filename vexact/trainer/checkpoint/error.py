"""What goes wrong with a checkpoint."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was there before is untouched."""


def write_failure(directory: Path, step: int, error: Exception) -> CheckpointError:
    """That the checkpoint of ``step`` could not be written below ``directory``, which may be missing."""
    if isinstance(error, CheckpointError):
        return error
    place = next((each for each in (directory, *directory.parents) if each.is_dir()), Path.cwd())
    free = shutil.disk_usage(place).free
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, FileNotFoundError):
        reason += "; is the run directory on a disk that all nodes share?"
    return CheckpointError(
        f"could not write {directory / f'step_{step}'} on {socket.gethostname()}: {reason} ({free / 2**20:.0f} MiB "
        "free). Earlier checkpoints are untouched. Free some space, lower trainer.keep_last, or point "
        "trainer.default_local_dir to another disk; the run then resumes from the last checkpoint"
    )
