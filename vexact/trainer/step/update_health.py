"""Updates that changed nothing, updates after which there is nothing to go on with, and GPUs that wait for others."""

from __future__ import annotations

import logging
from collections.abc import Sequence

log = logging.getLogger(__name__)
MUCH_IDLE = 0.25


class UpdateError(RuntimeError):
    """An update left weights or moments that are not finite, or too many in a row were skipped."""


class UpdateHealth:
    """Looks at what ``Actor.update`` says of itself: ``strict`` stops the run, the other modes warn once per kind."""

    def __init__(self, exactness: str, max_skipped_updates: int) -> None:
        self.is_strict, self.max_skipped = exactness == "strict", max_skipped_updates
        self._warned: set[str] = set()

    def check(self, metrics: dict[str, float], problems: Sequence[str]) -> None:
        """
        Args:
            metrics: of the update. problems: what the actor says about it.

        Raises:
            UpdateError: exactness is strict, and a weight or moment is not finite, or more than
                ``max_skipped_updates`` optimizer steps in a row were skipped.
        """
        self._tell_of_idle_gpus(metrics.get("perf/idle_share/actor", 0.0))
        cause = "; ".join(problems[-3:])
        if metrics["actor/nonfinite_tensors"]:
            self._tell("weights", f"weights or optimizer moments are not finite after this update: {cause}", True)
        skipped, in_a_row = metrics["actor/skipped_steps"], metrics["actor/skipped_in_a_row"]
        if skipped:
            self._tell(
                "skipped",
                f"{skipped:.0f} optimizer steps of this update were skipped, {in_a_row:.0f} in a row, since loss or "
                f"gradient were not finite ({cause}). The weights are as they were before them; "
                f"trainer.max_skipped_updates={self.max_skipped} in a row are let pass",
                in_a_row > self.max_skipped,
            )

    def _tell_of_idle_gpus(self, share: float) -> None:
        if share > MUCH_IDLE and "idle" not in self._warned:
            self._warned.add("idle")
            log.warning(
                "in the update %.0f %% of what the training processes could compute is waiting: a mini-batch has too "
                "few micro-batches for all of them, or uneven ones; lower "
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu, or train with fewer of them (perf/idle_share/actor "
                "says how it goes on)",
                100 * share,
            )

    def _tell(self, kind: str, text: str, is_too_much: bool) -> None:
        if is_too_much and self.is_strict:
            raise UpdateError(f"{text}. Earlier checkpoints are untouched; a lower learning rate may help")
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s (later ones are only counted: actor/skipped_steps, actor/nonfinite_tensors)", text)
