"""Draws repeated inside the training forward: what was sampled must be what seed, request and position say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vexact.models import LogitProbe
from vexact.ops import SamplingTensors, sample
from vexact.training.batches.batch import PackedBatch, ramps
from vexact.types import DrawSettings, Sample

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False)
class Redrawn:
    """K draws that were repeated, all arrays (K,)."""

    sequences: np.ndarray  # int64, indices of the samples
    positions: np.ndarray  # int64, in the response
    token_ids: np.ndarray  # int64, drawn from the trainer's logits
    min_logits: np.ndarray  # float32, the smallest kept logit
    best_ids: np.ndarray  # int64, the token with the largest of those logits


class Redraw:
    """Repeats a share of the draws of one update, from the trainer's logits and from what each request asked for.

    Sampling is a pure function of logits, settings, seed and position, so the repeated draw must give the sampled
    token. Nothing that the engine says of itself is used. Which tokens are chosen is a hash of seed and position.
    """

    def __init__(self, samples: Sequence[Sample], settings: Sequence[DrawSettings], ratio: float) -> None:
        """
        Args:
            settings: one per sample.
            ratio: share of the response tokens that is drawn again, 1 for all.

        Raises:
            ValueError: the numbers of samples and settings differ.
        """
        if len(samples) != len(settings):
            raise ValueError(f"{len(samples)} samples, but draw settings of {len(settings)}; give one per sample")
        self._ratio = ratio
        self._lengths = np.array([len(sample.token_ids) for sample in samples], np.int64)
        self._prompt_lengths = np.array([len(sample.prompt_token_ids) for sample in samples], np.int64)
        self._seeds = np.array([setting.seed for setting in settings], np.int64)
        self._filters = (  # as SamplingTensors begins
            np.array([setting.temperature for setting in settings], np.float32),
            np.array([setting.top_k for setting in settings], np.int32),
            np.array([setting.top_p for setting in settings], np.float32),
            np.array([setting.min_p for setting in settings], np.float32),
        )
        self._chosen: list[np.ndarray] = []  # (2, k) int64: sequence and response position
        self._drawn: list[Tensor] = []  # (3, k) int32: token, bits of the smallest kept logit, best token

    def watch(self, batch: PackedBatch, indices: Sequence[int]) -> PackedBatch:
        """``batch``, made of the samples ``indices`` in this order, whose forward repeats the chosen draws.

        Where ranks share the batch, each repeats those of its own tokens.
        """
        if not indices:
            return batch
        lengths = self._lengths[indices]
        sequences, responses = np.repeat(np.asarray(indices), lengths), ramps(lengths)
        seeds, positions = self._seeds[sequences], self._prompt_lengths[sequences] + responses
        rows = np.flatnonzero(_share(seeds, positions) < self._ratio)
        if batch.part is not None:
            own = batch.part.targets
            rows = rows[(own.start <= rows) & (rows < own.stop)]
        if not len(rows):
            return batch
        self._chosen.append(np.stack([sequences[rows], responses[rows]]))
        device = batch.input_ids.device
        columns = (*(column[sequences[rows]] for column in self._filters), seeds[rows], positions[rows])
        params = SamplingTensors(*(torch.from_numpy(column).to(device, non_blocking=True) for column in columns))

        def see(logits: Tensor, some: slice) -> None:
            drawn = sample(logits, SamplingTensors(*(values[some] for values in params)))
            best = logits.argmax(-1).to(torch.int32)
            self._drawn.append(torch.stack([drawn.token_ids.to(torch.int32), drawn.min_logit.view(torch.int32), best]))

        probe = LogitProbe(torch.from_numpy(rows).to(device, non_blocking=True), see)
        return replace(batch, targets=replace(batch.targets, probe=probe))

    def absorb(self, redrawn: Redrawn) -> None:
        """Adds what another process redrew with its copy of this object, for ``take``."""
        columns = (redrawn.token_ids, redrawn.min_logits.view(np.int32), redrawn.best_ids)
        self._chosen.append(np.stack([redrawn.sequences, redrawn.positions]))
        self._drawn.append(torch.from_numpy(np.stack([column.astype(np.int32) for column in columns])))

    def take(self) -> Redrawn:
        """What was redrawn since the last call, in one copy to the host."""
        if not self._chosen:
            nothing = np.empty(0, np.int64)
            return Redrawn(nothing, nothing, nothing, np.empty(0, np.float32), nothing)
        sequences, positions = np.concatenate(self._chosen, axis=1)
        token_ids, bits, best = torch.cat(self._drawn, dim=1).cpu().numpy()
        self._chosen, self._drawn = [], []
        min_logits = bits.view(np.float32)
        return Redrawn(sequences, positions, token_ids.astype(np.int64), min_logits, best.astype(np.int64))


def _share(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A number in [0, 1) per token: SplitMix64 (Steele, Lea & Flood 2014) of (seed, position)."""
    z = seeds.view(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
