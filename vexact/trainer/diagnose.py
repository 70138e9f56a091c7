"""A failed audit or self-test says where the two sides part, not only that they do."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from vexact.audit import ExactnessError
from vexact.audit.certificate import CertificateError
from vexact.audit.explain import explain
from vexact.models.nonfinite import cause_of_nonfinite
from vexact.rollout import Engine, SamplingParams
from vexact.trainer.workers import EngineGroup, Workers
from vexact.training import Actor
from vexact.types import Sample

log = logging.getLogger(__name__)
REPLAY_FILE, TEXT_FILE = "divergence.pt", "divergence.txt"


def diagnose(
    error: ExactnessError | CertificateError,
    sample: Sample,
    sampling: SamplingParams,
    workers: Workers,
    run_dir: Path,
    model_path: str,
) -> None:
    """Adds the first divergence to the error's message and writes it, with a replay file, into ``run_dir``.

    A diagnosis that fails is logged: the error stays what it is.

    Args:
        sample: what the first unequal token is in, sampled with ``sampling``.
    """
    first = error.comparison.first
    if isinstance(workers.engine, EngineGroup):
        error.add_note(f"sampled by {workers.engine.worker_of(sample)}")
        error.args = (f"{error}\nto see where the two sides part, repeat it in one process: trainer.n_gpus_per_node=1",)
        return
    assert isinstance(workers.engine, Engine)
    assert isinstance(workers.actor, Actor)
    if first is not None and not first.is_finite:
        actor = workers.actor
        error.args = (f"{error}\n{cause_of_nonfinite(actor.named_weights(), actor.config.torch_dtype)}",)
        if not math.isfinite(first.rollout) and not math.isfinite(first.trainer):
            return  # the two sides do not part
    log.info("looking for the first divergence of request %s", sample.request_id)
    try:
        found = explain(
            workers.engine,
            workers.actor,
            sample,
            run_dir / REPLAY_FILE,
            sampling_params=sampling,
            observed=first,
            model_path=model_path,
        )
        text = found.describe()
        (run_dir / TEXT_FILE).write_text(text + "\n", encoding="utf-8")
    except Exception:  # whatever goes wrong in here must not hide the error that is being diagnosed
        log.warning("no diagnosis: it failed itself", exc_info=True)
        return
    error.args = (f"{error}\n{text}\nrepeat it with: vexact verify --replay {run_dir / REPLAY_FILE}",)
