"""From logits that both sides agree on to the recorded log-probability: temperature, truncation, the draw, and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vexact.audit.compare import TokenDifference
from vexact.audit.explain.divergence import Side, same_bits
from vexact.audit.explain.expert_text import route_digests
from vexact.audit.explain.rollout_side import Draw, RolloutReplay
from vexact.types import Sample

Found = tuple[str, str, int, dict[str, Any]]  # stage, summary, position, further fields of Divergence
_FIT_ERROR = 1e-4  # largest |log-prob gap| at which a fitted temperature explains what was recorded


def sampler_stage(draws: Sequence[Draw], sample: Sample, knows_params: bool) -> Found | None:
    """What the sampler did in the replay. Truncation is known only when the request's parameters are."""
    for index, draw in enumerate(draws):
        found = _temperature(draw, sample) or _truncation(draw, sample, index, knows_params) or _draw(draw)
        if found is not None:
            return found
    return None


def _temperature(draw: Draw, sample: Sample) -> Found | None:
    asked = float(np.float32(sample.temperature))
    if not same_bits(draw.temperature, asked):
        sides = {"rollout": Side(draw.temperature, "sampler"), "trainer": Side(asked, "recorded in the sample")}
        summary = f"the sampler is given temperature {draw.temperature:.7g}, the sample records {asked:.7g}"
        return "temperature", summary, draw.position, {"where": "sampling parameters"} | sides
    ignores = same_bits(draw.logprob, draw.untempered_logprob) and not same_bits(draw.logprob, draw.right_logprob)
    matters = not same_bits(draw.untempered_logprob, draw.forced_logprob)  # 1 is no temperature to be ignored
    if ignores and matters and draw.token_id == draw.right_token_id:
        sides = {"rollout": Side(draw.logprob, "sampler"), "trainer": Side(draw.right_logprob, "vexact.ops.sample")}
        return "temperature", "the sampler's log-prob ignores the temperature", draw.position, sides
    return None


def _truncation(draw: Draw, sample: Sample, index: int, knows_params: bool) -> Found | None:
    threshold = float(sample.min_logits[index])
    wrong_mass = same_bits(draw.logprob, draw.untruncated_logprob) and not same_bits(draw.logprob, draw.right_logprob)
    if wrong_mass and draw.token_id == draw.right_token_id:  # of another token, its log-prob is another one anyway
        sides = {"rollout": Side(draw.logprob, "sampler"), "trainer": Side(draw.right_logprob, "vexact.ops.sample")}
        summary = "the sampler draws from truncated logits without renormalising: its log-prob is of the full softmax"
        return "truncation", summary, draw.position, {"where": "sampler", "op": "sample"} | sides
    if not same_bits(draw.min_logit, draw.right_min_logit):
        sides = {"rollout": Side(draw.min_logit, "sampler"), "trainer": Side(draw.right_min_logit, "vexact.ops.sample")}
        summary = "the sampler reports another min_logit than its parameters give, so the trainer keeps another set"
        return "truncation", summary, draw.position, {"where": "min_logit", "op": "sample"} | sides
    # a threshold that is no logit of this row comes from other logits, not from other parameters
    if knows_params and draw.recorded_cuts and not same_bits(draw.min_logit, threshold):
        sides = {"rollout": Side(draw.min_logit, "replay"), "trainer": Side(threshold, "recorded in the sample")}
        summary = "the recorded min_logit is not the one these parameters give"
        return "truncation", summary, draw.position, {"where": "min_logit"} | sides
    return None


def _draw(draw: Draw) -> Found | None:
    if draw.token_id != draw.right_token_id:
        sides = {"rollout": Side(draw.token_id, "sampler"), "trainer": Side(draw.right_token_id, "vexact.ops.sample")}
        summary = "the sampler draws another token than its logits, seed and position give"
        return "sampling", summary, draw.position, {"where": "token", "op": "sample"} | sides
    if not same_bits(draw.logprob, draw.right_logprob):
        sides = {"rollout": Side(draw.logprob, "sampler"), "trainer": Side(draw.right_logprob, "vexact.ops.sample")}
        summary = "the sampler's log-prob is not the shared definition on its own logits"
        return "sampling", summary, draw.position, {"where": "log-prob", "op": "sample"} | sides
    return None


def recorded_stage(
    rollout: RolloutReplay, sample: Sample, trained: np.ndarray, observed: TokenDifference | None
) -> Found | None:
    """Replay and trainer agree; is that also what was recorded when the request ran, and what the audit was given?"""
    first = len(sample.prompt_token_ids) - 1
    rerouted = _rerouted(rollout, sample)
    for i, draw in enumerate(rollout.draws):
        if not same_bits(float(sample.logprobs[i]), float(trained[i])):
            more: dict[str, Any] = {
                "where": "log-prob",
                "rollout": Side(float(sample.logprobs[i]), "recorded at generation"),
                "trainer": Side(float(trained[i]), "packed, and replayed now"),
            }
            if rerouted:
                more["notes"] = (
                    f"{len(rerouted)} of {len(sample.token_ids)} rows went to other experts at generation, the first "
                    f"predicts response token {rerouted[0]}",
                )
            stage, summary = _why_recorded(rollout, draw, sample, i)
            return stage, summary, first + i, more
    if rerouted:
        summary = (
            f"{len(rerouted)} of {len(sample.token_ids)} rows went to other experts at generation than now, in the "
            "replay and in the trainer; every log-prob agrees"
        )
        return "generation state", summary, first + rerouted[0], {"where": "routes"}
    if observed is not None and not same_bits(observed.trainer, float(trained[observed.position])):
        sides = {
            "rollout": Side(observed.rollout, "recorded at generation"),
            "trainer": Side(observed.trainer, "in the training batch"),
        }
        summary = (
            "alone, the trainer now reproduces the recorded log-prob; in its batch it did not: the training forward "
            "depends on batch mates, or its weights have changed since"
        )
        return "training state", summary, first + observed.position, {"where": "log-prob"} | sides
    return None


def _rerouted(rollout: RolloutReplay, sample: Sample) -> list[int]:
    """Response tokens whose recorded digest of experts is not that of the replay."""
    first = len(sample.prompt_token_ids) - 1
    now = route_digests(rollout.recorder, range(first, first + len(sample.token_ids)))
    if now is None or sample.route_digests is None:
        return []
    return [i for i, pair in enumerate(zip(sample.route_digests.tolist(), now, strict=True)) if pair[0] != pair[1]]


def _why_recorded(rollout: RolloutReplay, draw: Draw, sample: Sample, index: int) -> tuple[str, str]:
    recorded = float(sample.logprobs[index])
    if sample.min_logits[index] > -np.inf and same_bits(recorded, draw.untruncated_logprob):
        return "truncation", "the recorded log-prob is of the full softmax: truncated but not renormalised"
    if same_bits(recorded, draw.untempered_logprob):
        return "temperature", "the recorded log-prob is that of temperature 1"
    temperature = fit_temperature(rollout.logits, sample)
    if temperature is not None:
        return "temperature", (
            f"the recorded log-probs are those of temperature {temperature:.5g}, the sample records "
            f"{sample.temperature:.5g}"
        )
    return "generation state", (
        "the replay agrees with the trainer, the recorded log-prob does not: the state at generation time was another "
        "(a stale KV page, older weights, or batch mates that an operator reacted to)"
    )


def fit_temperature(logits: Sequence[Tensor], sample: Sample) -> float | None:
    """The temperature at which these logits give the recorded log-probs, if one number explains all of them."""
    rows = torch.stack(list(logits)).double()
    count = len(rows)
    kept = rows >= torch.from_numpy(sample.min_logits[:count]).double().unsqueeze(1)
    rows = rows.masked_fill(~kept, float("-inf"))
    chosen = rows.gather(1, torch.tensor(sample.token_ids[:count]).unsqueeze(1)).squeeze(1)
    recorded = torch.from_numpy(sample.logprobs[:count]).double()

    def error(factor: float) -> float:
        gap = chosen * factor - torch.logsumexp(rows * factor, dim=1) - recorded
        return float(gap.abs().max())

    low, high = 0.05, 20.0
    for _ in range(8):  # each round narrows a logarithmic grid to two of its cells
        grid = np.geomspace(low, high, 41)
        best = int(np.argmin([error(float(x)) for x in grid]))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 40)])
    factor = (low * high) ** 0.5
    changed = abs(factor - sample.inv_temperature) > 1e-5 * sample.inv_temperature
    return 1.0 / factor if changed and count > 1 and error(factor) < _FIT_ERROR else None
