"""``latest``: the one line that says which checkpoint a run goes on from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vexact.models.checkpoint.files import sync
from vexact.trainer.checkpoint.error import CheckpointError

FILE = "latest"
FOLDER = "checkpoints"
_LINE = re.compile(rf"{FOLDER}/(step_(?:0|[1-9][0-9]*))\n?")


class LatestPointer:
    """Follows the run, not the largest number. Relative, so that a run directory can be moved.

    A save announces its checkpoint before it gives it its name and commits afterwards. A run that is killed between the
    two leaves an announcement, which ``recover`` carries out if the checkpoint is there and drops if it is not:
    ``latest`` never names something that does not exist.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.file, self._announced = run_dir, run_dir / FILE, run_dir / f"{FILE}.tmp"

    def read(self) -> Path | None:
        """The checkpoint directory; None before the first checkpoint.

        Raises:
            CheckpointError: the file names no checkpoint of this run directory, or one that does not exist.
        """
        try:
            line = self.file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror}") from error
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{self.file} says {line.strip()[:80]!r}, which names no {FOLDER}/step_N of this run")
        path = self.run_dir / FOLDER / match[1]
        if not path.is_dir():
            raise CheckpointError(f"{self.file} names {FOLDER}/{match[1]}, which does not exist")
        return path

    def announce(self, name: str) -> None:
        """What ``commit`` will point to, on disk before the checkpoint has its name."""
        with self._announced.open("w", encoding="utf-8") as file:
            file.write(f"{FOLDER}/{name}\n")
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        self._announced.replace(self.file)
        sync(self.run_dir)

    def point(self, name: str) -> None:
        """To a checkpoint that exists."""
        self.announce(name)
        self.commit()

    def recover(self) -> None:
        """Finishes or drops what a killed run announced."""
        try:
            line = self._announced.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        match = _LINE.fullmatch(line) if line.endswith("\n") else None  # a line cut short may name another step
        if match is not None and (self.run_dir / FOLDER / match[1]).is_dir():
            self.commit()
        else:
            self._announced.unlink()

    def remove(self) -> None:
        """Points to nothing: the run starts anew."""
        self.file.unlink(missing_ok=True)
