"""Sequences laid end to end as the tensors of one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vexact.algorithms import LossScales
from vexact.models import Targets
from vexact.models.sequence_parallel import SlicedMetadata
from vexact.ops import PackedMetadata
from vexact.training.parallel.sequence_parallel import SequencePart, SequenceRanks
from vexact.types import TrainSequence


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """B sequences with T input tokens and R response tokens in all.

    The last token of a sequence predicts nothing, so it is a target but no input. Only ``targets.rows`` of the hidden
    states reach the language-model head: no logits of prompt tokens are ever computed. With a ``part`` other ranks
    compute the other tokens; the targets are those of all.
    """

    input_ids: Tensor  # (T,) int64, with a part this rank's slice
    positions: Tensor  # (T,) int64, from 0 in every sequence; with a part this rank's slice
    attention: PackedMetadata | SlicedMetadata
    targets: Targets  # the R response tokens
    response_lengths: Tensor  # (B,) int64
    part: SequencePart | None = None

    @property
    def packed(self) -> PackedMetadata:
        """Where the sequences lie, of all ranks that share them; behind the B ones there may be one that fills up."""
        return self.attention.packed if isinstance(self.attention, SlicedMetadata) else self.attention


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTargets:
    """What the policy loss needs per response token, all (R,) fp32. ``scales`` are there when samples are corrected."""

    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    scales: LossScales | None = None

    def at(self, tokens: slice) -> PolicyTargets:
        """Those of some response tokens."""
        reference = None if self.ref_logprobs is None else self.ref_logprobs[tokens]
        scales = None if self.scales is None else LossScales(self.scales.policy[tokens], self.scales.others[tokens])
        return PolicyTargets(self.old_logprobs[tokens], self.advantages[tokens], reference, scales)


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One sequence before packing: the prompt, the response and how the response was sampled."""

    prompt: Sequence[int]
    response: Sequence[int]
    inv_temperature: float = 1.0
    min_logits: np.ndarray | None = None  # (R,) fp32, None keeps the whole vocabulary

    @property
    def num_input_tokens(self) -> int:
        return len(self.prompt) + len(self.response) - 1


def token_sequence(sequence: TrainSequence) -> TokenSequence:
    """The token part of a sequence on its way into the trainer."""
    sample = sequence.sample
    return TokenSequence(sample.prompt_token_ids, sample.token_ids, sample.inv_temperature, sample.min_logits)


def pack_tokens(
    sequences: Sequence[TokenSequence], device: torch.device | str = "cpu", sharing: SequenceRanks | None = None
) -> PackedBatch:
    """Lays sequences end to end, for the ranks that are ``sharing`` their tokens, if any.

    Raises ValueError for an empty prompt or response.
    """
    for index, sequence in enumerate(sequences):
        if len(sequence.prompt) == 0 or len(sequence.response) == 0:
            part = "prompt" if len(sequence.prompt) == 0 else "response"
            raise ValueError(f"sequence {index} has an empty {part}; the first response token would have no context")
    prompt_lengths = np.array([len(s.prompt) for s in sequences])
    response_lengths = np.array([len(s.response) for s in sequences])
    input_lengths = prompt_lengths + response_lengths - 1
    starts = np.cumsum(input_lengths) - input_lengths
    inputs = np.array([token for s in sequences for part in (s.prompt, s.response[:-1]) for token in part], np.int64)
    positions = ramps(input_lengths)
    rows = ramps(response_lengths) + np.repeat(starts + prompt_lengths - 1, response_lengths)
    outputs = [token for s in sequences for token in s.response]
    inv_temperature = np.array([s.inv_temperature for s in sequences], np.float32)
    min_logits = _concatenate([_min_logits(s) for s in sequences])

    own: SequencePart | None = None
    attention: PackedMetadata | SlicedMetadata
    if sharing is None:
        attention = PackedMetadata.from_lengths(input_lengths.tolist(), device)
    else:
        own, attention = sharing.part(input_lengths.tolist(), rows, device)
        inputs, positions = own.slice_of(inputs), own.slice_of(positions)

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(values).to(device, non_blocking=True)

    return PackedBatch(
        input_ids=tensor(inputs),
        positions=tensor(positions),
        attention=attention,
        targets=Targets(
            rows=tensor(rows),
            token_ids=tensor(np.array(outputs, np.int64)),
            inv_temperature=tensor(np.repeat(inv_temperature, response_lengths)),
            min_logit=tensor(min_logits),
        ),
        response_lengths=tensor(response_lengths),
        part=own,
    )


def policy_targets(
    sequences: Sequence[TrainSequence], with_reference: bool, device: torch.device | str = "cpu"
) -> PolicyTargets:
    """Old log-probabilities, advantages and, if asked for, reference log-probabilities, packed."""

    def packed(of: Callable[[TrainSequence], np.ndarray]) -> Tensor:
        return torch.from_numpy(_concatenate([of(s) for s in sequences])).to(device, non_blocking=True)

    return PolicyTargets(
        old_logprobs=packed(lambda s: s.old_logprobs),
        advantages=packed(lambda s: s.advantages),
        ref_logprobs=packed(lambda s: np.asarray(s.ref_logprobs)) if with_reference else None,
    )


def ramps(lengths: np.ndarray) -> np.ndarray:
    """0..length-1 for every length, one after another: (B,) -> (sum,) int64."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _min_logits(sequence: TokenSequence) -> np.ndarray:
    if sequence.min_logits is None:
        return np.full(len(sequence.response), -np.inf, np.float32)
    return sequence.min_logits


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.float32, copy=False)
