"""The correction of one update's samples: verl's ``algorithm.rollout_correction``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vexact.algorithms import LossScales, importance_weights, kept_tokens, loss_scales
from vexact.training.config import ActorConfig
from vexact.types import TrainSequence

Rescore = Callable[[Sequence[TrainSequence]], Sequence[np.ndarray]]
"""Log-probabilities of all of the sequences under the current weights, on every rank."""


@dataclass(frozen=True, slots=True)
class _Corrected:
    weights: Tensor | None  # (T,) fp64
    kept: Tensor  # (T,) bool
    lengths: Tensor  # (N,)


class SampleCorrection:
    """Scales of the loss, by mini-batch, from whole batches: the same bits however they are packed and dealt to ranks.

    In a decoupled correction weights and rejections come from the old log-probabilities, once per update. In a bypass
    they come from the current policy at every optimizer step, which costs a forward without gradients: the first
    token's gradient needs the weight of its sequence and the mean over the mini-batch.
    """

    def __init__(self, config: ActorConfig, sequences: Sequence[TrainSequence], rescore: Rescore) -> None:
        self._config, self._sequences, self._rescore = config, sequences, rescore
        self._seen: list[dict[str, float]] = []
        self._whole = (
            None if config.correction.bypass else self._correct(sequences, [s.old_logprobs for s in sequences])
        )

    @classmethod
    def of(cls, config: ActorConfig, sequences: Sequence[TrainSequence], rescore: Rescore) -> SampleCorrection | None:
        """None when nothing is corrected."""
        return cls(config, sequences, rescore) if config.correction.is_on else None

    def scales(self, indices: Sequence[int]) -> list[LossScales]:
        """Those of the sequences of a mini-batch, each with its own tokens. All ranks call it together."""
        chosen = [self._sequences[i] for i in indices]
        corrected = self._correct(chosen, self._rescore(chosen)) if self._whole is None else _some(self._whole, indices)
        lengths = corrected.lengths
        packed = loss_scales(corrected.weights, corrected.kept, lengths, self._config.agg_mode, self._config.correction)
        pairs = zip(packed.policy.split(lengths.tolist()), packed.others.split(lengths.tolist()), strict=True)
        return [LossScales(policy, others) for policy, others in pairs]

    def metrics(self) -> dict[str, float]:
        """``rollout_corr/*``: of the update, in a bypass means over its optimizer steps."""
        means = {name: sum(seen[name] for seen in self._seen) / len(self._seen) for name in self._seen[0]}
        return {f"rollout_corr/{name}": value for name, value in means.items()}

    def _correct(self, sequences: Sequence[TrainSequence], logprobs: Sequence[np.ndarray]) -> _Corrected:
        config = self._config.correction
        ours, theirs = _packed(logprobs), _packed([s.sample.logprobs for s in sequences])
        lengths = torch.tensor([len(values) for values in logprobs])
        kept, metrics = kept_tokens(ours - theirs, lengths, config)
        weights = None
        if config.level is not None:
            weights, seen = importance_weights(ours - theirs, lengths, config)
            metrics |= seen
        self._seen.append(metrics)
        return _Corrected(weights, kept, lengths)


def packed_scales(scales: Sequence[LossScales], device: torch.device | str) -> LossScales:
    """Those of several sequences, end to end, on ``device``."""
    policy, others = (torch.cat([getattr(s, name) for s in scales]) for name in ("policy", "others"))
    return LossScales(policy.to(device, non_blocking=True), others.to(device, non_blocking=True))


def _packed(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).double()


def _some(whole: _Corrected, indices: Sequence[int]) -> _Corrected:
    lengths = whole.lengths.tolist()
    kept = whole.kept.split(lengths)
    weights = None if whole.weights is None else whole.weights.split(lengths)
    return _Corrected(
        None if weights is None else torch.cat([weights[i] for i in indices]),
        torch.cat([kept[i] for i in indices]),
        whole.lengths[list(indices)],
    )
