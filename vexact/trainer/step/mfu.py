"""Model FLOPs utilisation of an update."""

from __future__ import annotations

from collections.abc import Sequence

from vexact.config import Config
from vexact.models import ModelConfig
from vexact.models.flops import training_flops
from vexact.trainer.workers import Workers
from vexact.types import TrainSequence


class UpdateUtilisation:
    """Operations that the model needs, over those that the GPUs which train could have done in the time."""

    def __init__(self, config: Config, workers: Workers) -> None:
        self._model = ModelConfig.from_hf_dir(config.model.path)
        self._epochs, self._peak = config.actor.ppo_epochs, workers.peak_flops()

    def metrics(self, sequences: Sequence[TrainSequence], seconds: float) -> dict[str, float]:
        """``perf/mfu/actor`` of an update that took so long; nothing where the peak is not known."""
        if self._peak is None or seconds <= 0:
            return {}
        samples = [sequence.sample for sequence in sequences]
        lengths = [(len(sample.prompt_token_ids), len(sample.token_ids)) for sample in samples]
        return {"perf/mfu/actor": self._epochs * training_flops(self._model, lengths) / (seconds * self._peak)}
