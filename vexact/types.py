"""The records that cross a package boundary.

Shape legend used everywhere: T packed tokens, B sequences, V vocabulary, H hidden size, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
ScoreStatus = Literal["ok", "error", "timeout"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised dataset row.

    >>> Prompt(row=7, token_ids=(11, 5, 12), text="1+2=", data_source="add", ground_truth="3").row
    7
    """

    row: int  # index in the dataset, stable across epochs
    token_ids: tuple[int, ...]
    text: str
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


def inverse_temperature(temperature: float) -> float:
    """The fp32 factor of raw logits, as the sampler divides: in fp32. 1 where 0 means greedy.

    >>> float(np.float32(1 / 0.85)) == inverse_temperature(0.85)
    False
    """
    return float(np.float32(1.0) / np.float32(temperature)) if temperature > 0 else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One finished request.

    ``token_ids`` includes the stop token when ``finish_reason == "stop"`` was caused by one. ``logprobs[i]`` is the
    processed (after temperature and truncation) log-probability of ``token_ids[i]`` in fp32, bit for bit what the
    trainer computes. ``min_logits[i]`` is the smallest raw logit of the kept set {logit >= min_logit}; -inf keeps all.
    ``route_digests[i]`` is a hash of the experts, of all layers, that the row predicting ``token_ids[i]`` chose.
    ``prompt_logprobs[i]`` is that of ``prompt_token_ids[i + 1]`` at temperature 1; None unless asked for, and of a
    request that was aborted.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: np.ndarray  # (R,) float32
    min_logits: np.ndarray  # (R,) float32
    temperature: float  # 0 means greedy; its log-probs are those of temperature 1
    finish_reason: FinishReason
    weights_version: int
    stop_reason: str | int | None = None  # the stop string or stop token id that ended the request
    text: str | None = None  # decoded by the engine only when it has a tokenizer
    route_digests: np.ndarray | None = None  # (R,) int64; None of a model without experts
    prompt_logprobs: np.ndarray | None = None  # (P - 1,) float32

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def inv_temperature(self) -> float:
        """The fp32 factor every raw logit is multiplied by before the log-softmax."""
        return inverse_temperature(self.temperature)


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How a request asked to be sampled: with logits and a position, all that decides a token.

    ``top_k`` <= 0, ``top_p`` 1 and ``min_p`` 0 are off.
    """

    seed: int  # signed 64 bits, of this request alone
    temperature: float  # 0 means greedy
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True, slots=True)
class Score:
    """What a grader said about one sample. A failed grader gives ``value=0`` and says so in ``status``."""

    value: float
    extra: dict[str, float] = field(default_factory=dict)  # further numeric keys the grader returned
    status: ScoreStatus = "ok"
    message: str = ""
    seal: str = ""  # binds the value to the sample it was given for, see vexact.reward.seal


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """The n samples of one prompt and their scores; ``scores`` is empty until graded."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TrainSequence:
    """One sample on its way into the trainer.

    ``advantages`` is per response token. ``ref_logprobs`` is present only when a KL term is on, ``recomputed_logprobs``
    only with ``algorithm.recompute_old_log_prob``.
    """

    sample: Sample
    advantages: np.ndarray  # (R,) float32
    ref_logprobs: np.ndarray | None = None  # (R,) float32
    recomputed_logprobs: np.ndarray | None = None  # (R,) float32

    @property
    def old_logprobs(self) -> np.ndarray:
        """(R,) float32, the denominator of the importance ratio: the rollout's, unless the trainer recomputed them."""
        return self.sample.logprobs if self.recomputed_logprobs is None else self.recomputed_logprobs


@dataclass(frozen=True, slots=True)
class StepStats:
    """Everything one step reports: flat metric names to floats, verl's names where the meaning is the same."""

    step: int
    metrics: dict[str, float]
