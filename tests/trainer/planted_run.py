"""``vexact train`` with a stock norm in the engine of rank PLANTED_RANK, from weights version PLANTED_VERSION on."""

import dataclasses
import os
import sys

from vexact.cli import main
from vexact.models.opset import set_ops
from vexact.ops import stock
from vexact.trainer.workers.worker import Worker

if os.environ["RANK"] == os.environ["PLANTED_RANK"]:
    sync = Worker.sync

    def planted(worker: Worker, version: int, *more: bool) -> dict[str, float]:
        metrics = sync(worker, version, *more)
        if version == int(os.environ["PLANTED_VERSION"]):
            model = worker.engine.model
            set_ops(model, dataclasses.replace(model.ops, rms_norm=stock.rms_norm))
        return metrics

    Worker.sync = planted

sys.exit(main(sys.argv[1:]))
