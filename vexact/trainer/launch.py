"""From a configuration to a finished run, in this process."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch

from vexact import interrupt
from vexact.audit import Audit
from vexact.config import Config
from vexact.config.plan import build_plan
from vexact.device import resolve_device
from vexact.report import Reporter
from vexact.trainer.checkpoint import CheckpointStore
from vexact.trainer.driver import Driver, how_to_go_on, resume_point
from vexact.trainer.preflight import check_rewards
from vexact.trainer.run_record import write_run_record
from vexact.trainer.workers import build_workers, num_steps

log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Trains (or with ``trainer.val_only`` validates) as configured; 0 when every step was done.

    Raises:
        ValueError, FileNotFoundError and the named errors of this package: what the user has to fix.
    """
    device = torch.device(resolve_device(config.trainer.device))
    with interrupt.borrowed(), interrupt.unwinding(), ExitStack() as stack:  # a signal closes workers and sinks
        workers = build_workers(config, device)
        stack.callback(workers.close)
        check_rewards(config, workers)
        store = CheckpointStore(config.run_dir, config.trainer.keep_last)
        store.remove_leftovers()
        progress = resume_point(config, store, workers)
        total_steps = num_steps(config, len(workers.train_data))
        reporter = Reporter(
            config.trainer.logger,
            config.run_dir,
            project=config.trainer.project_name,
            experiment=config.trainer.experiment_name,
            config=config.to_dict(),
            total_steps=total_steps,
            resume_step=progress.step or None,
        )
        stack.enter_context(reporter)
        plan = build_plan(config, device.type)
        reporter.plan(plan.rows, plan.advice)
        write_run_record(config, device)
        interrupt.note(how_to_go_on(config, progress.step))
        if progress.step:
            log.info("resuming after step %d", progress.step)
        Driver(config, workers, reporter, store, Audit(config.trainer.exactness), total_steps, progress).run()
        interrupt.check()
    return 0
