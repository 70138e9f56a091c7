"""Samples that are older than the trainer, compared bit for bit under exactly the weights that generated them."""

from __future__ import annotations

from collections.abc import Sequence

from vexact.audit import Audit, DrawError, ExactnessError
from vexact.config import Config
from vexact.report import Timers
from vexact.trainer.workers import Workers
from vexact.types import TrainSequence


class PastAudit:
    """A forward of its own with the weights of an earlier version, at some of the steps, before the step trains."""

    def __init__(self, config: Config, workers: Workers, audit: Audit, timers: Timers, first: int) -> None:
        """``first``: the first step whose samples this process generates; weights from before are not at hand."""
        self._config, self._workers, self._audit, self._timers, self._first = config, workers, audit, timers, first

    def is_due(self, step: int) -> bool:
        """Every ``trainer.async_audit_freq`` steps, and in the first step that can be compared."""
        trainer = self._config.trainer
        if not trainer.async_steps or trainer.exactness == "off" or trainer.async_audit_freq < 0:
            return False
        return step >= self._first and (step == self._first or (step - 1) % trainer.async_audit_freq == 0)

    def needs(self, version: int) -> bool:
        """Whether the weights of ``version``, which a later version will replace, have to be kept."""
        return self.is_due(version + 2)  # trained by the step after the next one

    def compare(self, step: int, sequences: Sequence[TrainSequence]) -> None:
        """When due.

        Raises:
            ExactnessError, DrawError: as ``Audit.check``; no weight has changed then.
        """
        if not self.is_due(step):
            return
        version, audit = sequences[0].sample.weights_version, self._audit
        with self._timers("audit_forward"):
            found = self._workers.rescore_at(version, sequences, audit.redraw)
        try:
            audit.check(*found)
            audit.require_compared(len(sequences))
        except (ExactnessError, DrawError) as error:
            error.add_note(f"compared under weights version {version}, which generated the samples of step {step}")
            raise
