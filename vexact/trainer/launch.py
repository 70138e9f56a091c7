"""From a configuration to a finished run, in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vexact import interrupt
from vexact.audit import Audit
from vexact.config import Config
from vexact.config.memory import ModelShape, resume_note, with_recomputation
from vexact.config.plan import build_plan
from vexact.data import PromptDataset
from vexact.distributed import Layout, WorkerError
from vexact.report import Reporter
from vexact.trainer.ahead import read_collected
from vexact.trainer.checkpoint import BestPointer, CheckpointStore, Progress
from vexact.trainer.driver import Driver, how_to_go_on
from vexact.trainer.preflight.checks import check_before_training, checkpoint_bytes
from vexact.trainer.preflight.machine import layout_of, machine_of
from vexact.trainer.resume import Source, check_changes, find_source, note_environment, run_identity
from vexact.trainer.resume.changes import Identity, breaking_changes
from vexact.trainer.run.directory import RunDirectoryError, open_run_directory, set_aside, set_divergence_aside
from vexact.trainer.run.final_report import final_report
from vexact.trainer.run.pending_step import PendingStep
from vexact.trainer.run.record import write_run_record
from vexact.trainer.run.validation import place_validation
from vexact.trainer.step.collect import Collected
from vexact.trainer.step.profile import check_profile
from vexact.trainer.workers import build_workers, load_inputs, num_steps
from vexact.trainer.workers.memory import advising

log = logging.getLogger(__name__)


def run(config: Config, layout: Layout | None = None) -> int:
    """Trains (or with ``trainer.val_only`` validates) as configured, on the processes of ``layout`` if it is resolved
    already; 0 when every step was done.

    What can be wrong is looked for in the order of its cost: the run directory, the checkpoint to go on from, data and
    settings, the model, the graders. Nothing of an earlier run is touched before all of it is right.

    Raises:
        ValueError, FileNotFoundError and the named errors of this package: what the user has to fix.
    """
    layout = layout_of(config) if layout is None else layout
    # a signal closes workers and sinks
    with interrupt.borrowed(), interrupt.unwinding(), _saying_how_to_go_on(), ExitStack() as stack:
        stack.enter_context(open_run_directory(config.run_dir, checkpoint_bytes(config)))
        best = BestPointer(config.run_dir, config.trainer.best_metric, config.trainer.best_metric_mode)
        store = CheckpointStore(config.run_dir, config.trainer.keep_last, best)
        store.remove_leftovers()
        source = find_source(config, store)
        inputs = load_inputs(config)
        total_steps = num_steps(config, len(inputs.train_data))
        check_profile(config, total_steps, layout.world_size)
        identity = run_identity(config, layout.device, total_steps, inputs.tokenizer, inputs.train_data)
        told = _check_source(config, store, source, identity)
        if source is not None and _is_finished(config, source, total_steps):
            log.info(
                "nothing is left to do: step %d of %d is saved in %s; raise trainer.total_training_steps to go on, or "
                "start anew with trainer.resume_mode=disable",
                source.step,
                total_steps,
                source.path,
            )
            return 0
        machine, shape = machine_of(layout), ModelShape.read(config.model.path)
        plan = build_plan(config, machine, shape)
        for name, value in plan.memory:
            log.info("%s: %s", name, value)
        note = None if source is None else resume_note(config, shape, machine)
        if note is not None:  # before it is read: whom the kernel ends for its memory has no last word
            log.warning("%s", note)
        with advising(config, lambda: None):
            workers = build_workers(with_recomputation(config, shape, machine), layout, inputs)
        stack.callback(workers.close)
        stack.enter_context(workers.heeding())
        if workers.sleeps:  # until the first sync
            workers.release_memory()
        identity["environment"] = workers.environment()
        identity["model"]["weights"] = workers.weights_digest()
        check_before_training(config, workers)
        progress, ready = Progress(0, 0), None
        if source is not None:
            check_changes(source, identity, _may_change(config), told)
            note_environment(source, identity)
            progress = source.restore(workers)
            ready = _ready(config, source, identity, progress.step + 1, inputs.train_data)
        shown = config
        if not config.trainer.val_only:
            _begin_part(config, store, source, progress)
        elif source is not None and source.in_this_run:
            shown = place_validation(config, _trained(source) or {}, progress.step)
        reporter = Reporter(
            shown.trainer.logger,
            shown.run_dir,
            project=shown.trainer.project_name,
            experiment=shown.trainer.experiment_name,
            config=shown.to_dict(),
            total_steps=total_steps,
            resume_step=_last_reported(config, progress) if shown is config else None,
        )
        stack.enter_context(reporter)
        reporter.plan([row for row in plan.rows if row not in plan.memory], plan.advice)
        if shown is not config:
            write_run_record(shown, workers.environment())
        elif not (config.trainer.val_only and progress.step):  # the record tells how the run was trained
            write_run_record(config, workers.environment(), progress.step + 1, _trained(source))
        interrupt.note(how_to_go_on(config, progress.step))
        if progress.step:
            log.info("%s step %d", "validating" if config.trainer.val_only else "resuming after", progress.step)
        redraw_ratio = config.trainer.audit_redraw_ratio if config.rollout.is_own else 0.0  # it knows our draws only
        audit = Audit(config.trainer.exactness, redraw_ratio)
        driver = Driver(shown, workers, reporter, store, audit, total_steps, progress, identity, ready)
        with final_report(shown, reporter), advising(config, lambda: driver.stage), workers.heeding():
            driver.run()
        interrupt.check()
    return 0


@contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    """A worker that is lost leaves word of it, once there is something to go on from."""
    try:
        yield
    except WorkerError as error:
        if error.is_fault:
            interrupt.cause("")  # from here on the error says it
            error.args = ("; ".join(filter(None, (str(error), interrupt.noted()))),)
        raise


def _check_source(config: Config, store: CheckpointStore, source: Source | None, identity: dict[str, Any]) -> list[str]:
    """Whether the run may go on from ``source``, before the model is loaded; the changes that were told."""
    told = [] if source is None else check_changes(source, identity, _may_change(config))
    if config.trainer.val_only and config.trainer.resume_mode != "auto" and store.steps(_last_kept(source)):
        raise RunDirectoryError(
            f"trainer.val_only=true with trainer.resume_mode={config.trainer.resume_mode} validates other weights than "
            f"those that {config.run_dir} stands at; set trainer.default_local_dir to another directory"
        )
    return told


def _trained(source: Source | None) -> dict[str, Any] | None:
    """The configuration of the step that this run directory stands at, where it is known."""
    return source.identity.get("config") if source and source.in_this_run and source.identity else None


def _ready(config: Config, source: Source, identity: Identity, step: int, rows: PromptDataset) -> Collected | None:
    """The groups of ``step`` that the run before generated ahead; None, with a notice, where there are none of use."""
    if not config.trainer.async_steps or config.trainer.val_only:
        return None
    if source.identity is not None and breaking_changes(source.identity, identity):
        log.info("step %d samples anew: what was generated for it ahead is of the run before the changes", step)
        return None
    ready = read_collected(source.path, step, rows)
    if ready is None:
        log.info(
            "%s holds no samples of step %d, so this step samples with the weights it trains, which are one version "
            "newer than in a run without a break",
            source.path,
            step,
        )
    return ready


def _begin_part(config: Config, store: CheckpointStore, source: Source | None, progress: Progress) -> None:
    """Sets aside what the run does not go on from, so that its directory holds one run."""
    after = _last_kept(source)
    abandoned = store.steps(after)
    if source is not None and source.in_this_run:
        store.go_on_from(progress.step)
    elif abandoned:
        store.go_on_from(None)
    moved = [set_aside(config.run_dir, store, after)] if progress.step == 0 or abandoned else []
    moved.append(set_divergence_aside(config.run_dir))
    if any(moved):
        names = ", ".join(filter(None, moved))
        log.info("set aside what this run does not go on from: %s in %s", names, config.run_dir)


def _last_kept(source: Source | None) -> int:
    """The last step of this run directory that stays; -1: none does."""
    return source.step if source is not None and source.in_this_run and source.step is not None else -1


def _is_finished(config: Config, source: Source, total_steps: int) -> bool:
    if config.trainer.val_only or source.step is None or source.step < total_steps:
        return False
    return not source.in_this_run or PendingStep(config.run_dir).metrics(source.step) is None


def _last_reported(config: Config, progress: Progress) -> int | None:
    """The last step whose row stays: one that waits for its report is reported again. None: a new run."""
    if not progress.step:
        return None
    waits = not config.trainer.val_only and PendingStep(config.run_dir).metrics(progress.step) is not None
    return progress.step - 1 if waits else progress.step


def _may_change(config: Config) -> bool:
    """A validation does not go on with the run, so it may look at it under other settings."""
    return config.trainer.resume_changed == "allow" or config.trainer.val_only
