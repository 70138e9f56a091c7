"""TensorBoard event files in ``<run>/tensorboard``."""

from __future__ import annotations

from vexact.report.sink import MissingPackageError, RunInfo, Sink
from vexact.types import StepStats


class TensorboardSink(Sink):
    """A scalar per metric; a resumed run hides the steps that it repeats."""

    def __init__(self, run: RunInfo) -> None:
        """Raises MissingPackageError without the package tensorboard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError("tensorboard", "tensorboard") from error
        purge = None if run.resume_step is None else run.first_step
        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purge)

    def step(self, stats: StepStats) -> None:
        for name, value in stats.metrics.items():
            self._writer.add_scalar(name, value, stats.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
