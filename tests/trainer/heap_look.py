"""Workers that note in which of a run's processes the garbage collector passes over what it was built with.

As a script, `vexact train` with them: `python heap_look.py FOLDER key=value …`. Ray's workers find it on PYTHONPATH.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planted_fault

from vexact.config import Config
from vexact.distributed import RankInfo
from vexact.trainer.driver import Driver
from vexact.trainer.workers import build
from vexact.trainer.workers.roles import Roles
from vexact.trainer.workers.worker import Worker


def is_walked(thing: Any) -> bool:
    """Whether a full collection would look at it."""
    return any(each is thing for each in gc.get_objects())


@dataclass(frozen=True, slots=True)
class Look(planted_fault.Fault):
    """Planted into rank 0 as a fault would be; every process of the run leaves a file a step in ``folder``."""

    folder: Path = Path()

    def plant(self) -> None:
        build._worker = functools.partial(_make, self.folder)
        original = Driver._step

        def looking(driver: Driver, step: int) -> float:
            _note(self.folder, "driver", step, driver.workers.actor)
            return original(driver, step)

        Driver._step = looking  # type: ignore[method-assign]


class _Looking(Worker):
    folder: Path

    def sync(self, version: int, keep: bool) -> dict[str, float]:
        _note(self.folder, f"rank_{self.info.rank}", version, self._actor)
        return super().sync(version, keep)


def _make(folder: Path, config: Config, roles: Roles, total_steps: int, info: RankInfo) -> Worker:
    worker = _Looking(config, roles, total_steps, info)
    worker.folder = folder
    return worker


def _note(folder: Path, who: str, step: int, thing: Any) -> None:
    (folder / f"{who}_step_{step}_pid_{os.getpid()}").write_text("walked" if is_walked(thing) else "passed over")


if __name__ == "__main__":
    import heap_look

    from vexact.cli import main

    heap_look.Look("the update", "look", folder=Path(sys.argv[1])).plant()
    sys.argv[:2] = ["vexact", "train"]
    sys.exit(main())
