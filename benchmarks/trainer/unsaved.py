"""``vexact train`` that ends with digests of its state where its last checkpoint would be, and saves nothing else.

    python -m benchmarks.trainer.unsaved train key=value …
    torchrun --nproc-per-node=4 -m benchmarks.trainer.unsaved train key=value …

For runs whose checkpoint would take longer than their steps: of 8 B parameters it has 98 GB. Every rank hashes its
share of the tensors, from the memory in which they were trained; the digests are those of a checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.trainer.digests import combined, share
from vexact import interrupt
from vexact.cli import main
from vexact.trainer import launch
from vexact.trainer.driver import Driver
from vexact.trainer.workers.groups import ActorGroup
from vexact.trainer.workers.worker import Worker
from vexact.training import Actor

FILE = "digests.json"


def read(directory: Path) -> dict[str, str]:
    """Digests of the state that the run of this directory ended with."""
    return dict(json.loads((directory / FILE).read_text()))


def save_nothing() -> None:
    """Has runs of this process, and workers in it, write digests in place of checkpoints."""

    def of_worker(worker: Worker) -> dict[str, dict[str, str]]:
        return share(worker.actor)

    def write(driver: Driver) -> None:
        if driver.progress.step < driver.total_steps:
            return
        workers = driver.workers
        workers.release_memory()  # makes room for whole tensors
        if workers.group is None:
            assert isinstance(workers.actor, Actor)
            parts = [share(workers.actor)]
        else:
            assert isinstance(workers.actor, ActorGroup)
            parts = workers.group.call("digest_share", ranks=workers.actor.ranks, stage="hashing the state")
        hashes: dict[str, dict[str, str]] = {}
        for part in parts:
            for name, kinds in part.items():
                hashes.setdefault(name, {}).update(kinds)
        (driver.config.run_dir / FILE).write_text(json.dumps(combined(hashes)) + "\n")

    Worker.digest_share = of_worker  # type: ignore[attr-defined]
    Driver._save = write  # type: ignore[method-assign]
    launch.checkpoint_bytes = lambda config: 0  # the disk needs no room


if __name__ == "__main__":
    interrupt.install()
    save_nothing()
    raise SystemExit(main())
