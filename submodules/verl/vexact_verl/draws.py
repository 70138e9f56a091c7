"""How a sample was drawn: asked for in verl's words, and carried with it so that the trainer scores the same thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.config import RolloutConfig

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING, check_refused_sampling
from vexact.rollout import SamplingParams
from vexact.types import Sample

KEY = "vexact"
"""Under this name a sample carries its ``Draw`` in verl's ``extra_fields``."""
_NEUTRAL = {"n": 1, "prompt_logprobs": None}
_PASSED_ON = ("stop", "stop_token_ids", "seed", "ignore_eos")
_thresholds_expected = False


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides the distribution that tokens come from."""

    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def __str__(self) -> str:
        return f"temperature={self.temperature:g}, top_p={self.top_p:g}, top_k={self.top_k}, min_p={self.min_p:g}"


@dataclass(frozen=True, slots=True)
class Draw:
    """The part of a sample that decides its log-probabilities besides the tokens."""

    temperature: float
    min_logits: np.ndarray | None  # (R,) fp32; None keeps the whole vocabulary


class Requests:
    """Turns verl's requests into vexact's. Refuses what the trainer would score in another way."""

    def __init__(self, config: RolloutConfig, max_model_len: int, carries: bool) -> None:
        """``carries``: whether what a sample carries reaches the trainer. It does from the servers of a hybrid worker.

        Raises ValueError when training samples are to be truncated, and it does not.
        """
        self._config, self._max_model_len = config, max_model_len
        self._training, validation = Kind(config.temperature, config.top_p, max(-1, config.top_k)), config.val_kwargs
        self._validation = Kind(validation.temperature, validation.top_p, max(-1, validation.top_k))
        if self._training.truncates and not carries:
            raise ValueError(
                f"rollout: {self._training}: the thresholds of a truncated distribution do not reach the trainer from "
                "a standalone rollout; use top_p=1 and top_k=-1, or a hybrid one"
            )

    def params(self, request: Mapping[str, Any], num_prompt_tokens: int) -> SamplingParams:
        """Raises ValueError naming what is not known, or not what training and validation were configured with."""
        left = dict(request)
        limits = [left.pop(key, None) for key in ("max_tokens", "max_new_tokens")]
        left.pop("logprobs", None)  # they always come
        for key, neutral in _NEUTRAL.items():
            if left.pop(key, neutral) not in (neutral, None):
                raise ValueError(f"sampling parameter {key}={request[key]!r} is not built in; leave it at {neutral}")
        check_refused_sampling({name: left.pop(name) for name in REFUSED_SAMPLING if name in left})
        kind = Kind(*(left.pop(name, default) for name, default in vars_of(self._training)))
        if kind not in (self._training, self._validation):
            raise ValueError(
                f"a request asks for {kind}, but rollout has {self._training} and rollout.val_kwargs "
                f"{self._validation}; the trainer could not score it"
            )
        room = self._max_model_len - num_prompt_tokens
        if room < 1:
            raise ValueError(
                f"a prompt of {num_prompt_tokens} tokens leaves no room in max_model_len={self._max_model_len}"
            )
        asked = next((limit for limit in limits if limit is not None), self._config.response_length)
        passed = {key: left.pop(key) for key in _PASSED_ON if key in left}
        if left:
            raise ValueError(f"unknown sampling parameters {', '.join(sorted(left))}")
        settings = {"ignore_eos": self._config.ignore_eos} | passed
        return SamplingParams(
            max_tokens=min(asked, room),
            temperature=kind.temperature,
            top_p=kind.top_p,
            top_k=kind.top_k,
            min_p=kind.min_p,
            **settings,
        )


def vars_of(kind: Kind) -> list[tuple[str, Any]]:
    """Names, and what they are where a request does not say: no filter."""
    return [("temperature", kind.temperature), ("top_p", 1.0), ("top_k", -1), ("min_p", 0.0)]


def carried_by(sample: Sample, params: SamplingParams) -> dict[str, Any]:
    """What goes into ``extra_fields``: plain numbers, which fp32 ones survive as they are."""
    truncates = Kind(params.temperature, params.top_p, params.top_k, params.min_p).truncates
    return {
        "temperature": sample.temperature,
        "min_logits": sample.min_logits.tolist() if truncates else None,
        "weights_versions": [sample.weights_version] * len(sample.token_ids),
    }


def expect_thresholds(config: RolloutConfig) -> None:
    """Said by the rollout of a hybrid worker to the training engine in the same process, to which verl gives no rollout
    configuration: whether a sample without thresholds must have lost them."""
    global _thresholds_expected
    _thresholds_expected = Kind(config.temperature, config.top_p, config.top_k).truncates


def read_draws(data: TensorDict, response_lengths: Sequence[int]) -> list[Draw]:
    """How each sequence of a batch was drawn: as it carries, else at the batch's temperature.

    What verl fills a batch up with, a sequence without a token that counts, carries what belongs to another one.

    Raises ValueError for thresholds that are lost, or are not one per response token.
    """
    temperatures = _temperatures(data, len(response_lengths))
    fields = _rows(data, "extra_fields") or _rows(data, KEY) or [None] * len(response_lengths)
    draws = []
    for temperature, field, length, counts in zip(temperatures, fields, response_lengths, _count(data), strict=True):
        if not counts:
            draws.append(Draw(temperature, None))
            continue
        carried = field.get(KEY, field) if isinstance(field, Mapping) else {}
        thresholds = carried.get("min_logits")
        if thresholds is not None and len(thresholds) != length:
            raise ValueError(
                f"a response of {length} tokens carries {len(thresholds)} thresholds; top_p and top_k need agent loops "
                "that generate a response in one piece"
            )
        if thresholds is None and _thresholds_expected and "temperature" not in carried:
            raise ValueError(
                "rollout.top_p or top_k is set, but a sample came without its thresholds: this trainer's client drops "
                "them; use trainer.v1.trainer_mode=sync, or top_p=1 and top_k=-1"
            )
        min_logits = None if thresholds is None else np.asarray(thresholds, np.float32)
        draws.append(Draw(float(carried.get("temperature", temperature)), min_logits))
    return draws


def _temperatures(data: TensorDict, count: int) -> list[float]:
    value = tu.get(data, "temperature", 1.0)
    value = value.tolist() if isinstance(value, Tensor) else value
    return [float(each) for each in value] if isinstance(value, list) else [float(value)] * count


def _count(data: TensorDict) -> list[bool]:
    """Which sequences have a token that counts."""
    return [bool(mask.any()) for mask in data["loss_mask"].unbind()]


def _rows(data: TensorDict, key: str) -> list[Any] | None:
    rows: list[Any] | None = tu.get(data, key, None)
    return rows
