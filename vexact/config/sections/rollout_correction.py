"""`algorithm.rollout_correction.*`: what to do about samples whose policy was not the trainer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vexact.config.fields import LARGEST_FLOAT, opt

KEY = "algorithm.rollout_correction"
RS_OPTIONS = (
    *(f"{level}_{kind}" for level in ("token", "seq_sum", "seq_mean") for kind in ("k1", "k2", "k3")),
    "seq_max_k2",
    "seq_max_k3",
)
_FORMER = {"token": "token_k1", "sequence": "seq_sum_k1", "geometric": "seq_mean_k1"}


@dataclass(frozen=True)
class RolloutCorrection:
    rollout_is: Literal["token", "sequence"] | None = opt(
        None, "Importance weights pi / pi_rollout on the policy loss, per token or per sequence; null is none."
    )
    rollout_is_threshold: str = opt(
        "2.0",
        "Largest weight (truncated importance sampling), or LOWER_UPPER such as 0.5_5.0: a weight outside of them is 0 "
        "(IcePop).",
    )
    rollout_is_batch_normalize: bool = opt(False, "Divide the weights by their mean over the batch.")
    rollout_rs: str | None = opt(
        None,
        "Leave out tokens or sequences by how far the policies are apart, one or several (a,b), all of which must "
        "pass: "
        f"{', '.join(RS_OPTIONS)}. With d = log(pi / pi_rollout): k1 = -d, k2 = d^2/2, k3 = exp(d) - 1 - d; "
        "seq_mean_k1 is the geometric mean of the ratio.",
    )
    rollout_rs_threshold: str | None = opt(
        None,
        "Bounds of rollout_rs, one for all or one each (a,b). k1: LOWER_UPPER of the ratio pi_rollout / pi, or UPPER, "
        "with 1/UPPER below; k2 and k3: the largest value in nats.",
    )
    rollout_token_veto_threshold: float | None = opt(
        None,
        "Leave out a sequence that has a token whose ratio pi / pi_rollout is below this, such as 1e-4 (a key of "
        "earlier verl versions).",
        gt=0,
        lt=1,
    )
    bypass_mode: bool | None = opt(
        None,
        "true: pi is the policy being trained, and the rollout's log-probabilities are the old ones. false: pi is the "
        "old policy by algorithm.recompute_old_log_prob. null is true unless that is set.",
        verl=False,
    )
    loss_type: Literal["ppo_clip", "reinforce"] = opt(
        "ppo_clip",
        "With bypass: ppo_clip is actor.policy_loss.loss_mode, whose ratio is the weight already; reinforce replaces "
        "it by -A logprob times the weight.",
    )

    @property
    def is_on(self) -> bool:
        return (
            self.rollout_is is not None or self.rollout_rs is not None or self.rollout_token_veto_threshold is not None
        )

    def weight_bounds(self) -> tuple[float | None, float]:
        """(lower or None, upper) of ``rollout_is_threshold``. Raises ValueError naming the key."""
        key, text = f"{KEY}.rollout_is_threshold", self.rollout_is_threshold
        fix = f"give the largest weight, e.g. {key}=2.0, or both bounds, e.g. {key}=0.5_5.0"
        return _bounds(key, text, text, fix)

    def rejections(self) -> list[tuple[str, float | None, float]]:
        """(option, lower or None, upper) of every option of ``rollout_rs``. Raises ValueError naming the key."""
        if self.rollout_rs is None:
            return []
        key, text = f"{KEY}.rollout_rs_threshold", self.rollout_rs_threshold
        options = self._options()
        if text is None:
            raise ValueError(
                f"{KEY}.rollout_rs={self.rollout_rs} needs {key}, e.g. 0.5_2.0 for k1 or 0.01 for k2 and k3"
            )
        parts = [part.strip() for part in text.split(",")]
        if len(parts) not in (1, len(options)):
            raise ValueError(
                f"{key}={text}: {len(parts)} thresholds for the {len(options)} options of {KEY}.rollout_rs="
                f"{self.rollout_rs}; give one for all, or one each"
            )
        parts = parts if len(parts) == len(options) else parts * len(options)
        return [self._rejection(option, part, key, text) for option, part in zip(options, parts, strict=True)]

    def _options(self) -> list[str]:
        assert self.rollout_rs is not None, "the caller has looked"
        options = [part.strip() for part in self.rollout_rs.split(",")]
        for option in options:
            if option not in RS_OPTIONS:
                renamed = f"{option} is called {_FORMER[option]} now; " if option in _FORMER else ""
                raise ValueError(
                    f"{KEY}.rollout_rs={self.rollout_rs}: {renamed}every option must be one of "
                    f"{', '.join(RS_OPTIONS)}, or null for none"
                )
            if options.count(option) > 1:
                raise ValueError(f"{KEY}.rollout_rs={self.rollout_rs}: {option} is given twice; keep one of them")
        return options

    @staticmethod
    def _rejection(option: str, part: str, key: str, text: str) -> tuple[str, float | None, float]:
        if option.endswith("k1"):
            fix = f"{option} takes both bounds of a ratio, e.g. {key}=0.5_2.0, or the upper one, e.g. {key}=2.0"
            lower, upper = _bounds(key, text, part, fix)
            lower = 1 / upper if lower is None else lower
            if lower > upper:
                raise ValueError(f"{key}={text}: {fix}; an upper bound alone must be at least 1")
            return option, lower, upper
        fix = f"{option} takes the largest value in nats, e.g. {key}=0.01"
        lower, upper = _bounds(key, text, part, fix)
        if lower is not None:
            raise ValueError(f"{key}={text}: {fix}; it has no lower bound")
        return option, None, upper


def _bounds(key: str, text: str, part: str, fix: str) -> tuple[float | None, float]:
    """(lower or None, upper) of ``UPPER`` or ``LOWER_UPPER``, positive and finite, in order."""
    pieces = part.split("_")
    try:
        values = [float(piece) for piece in pieces]
    except ValueError as error:
        raise ValueError(f"{key}={text}: {part!r} is no bound; {fix}") from error
    if len(values) > 2 or not all(0 < value <= LARGEST_FLOAT and math.isfinite(1 / value) for value in values):
        raise ValueError(f"{key}={text}: bounds must be one or two positive numbers; {fix}")
    if values[0] > values[-1]:
        raise ValueError(f"{key}={text}: the lower bound {pieces[0]} is above the upper one {pieces[1]}; {fix}")
    return (values[0] if len(values) == 2 else None), values[-1]
