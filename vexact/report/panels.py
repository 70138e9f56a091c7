"""Which metrics stand together in one picture, and in which order: the one table behind the HTML page, TensorBoard's
custom scalars and W&B's view."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

PARTS = "parts of a step"
"""The title of the stacked panel, of which every group of runs has one."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: the metrics that fit any of ``names``, which may hold ``*``, and not ``but``."""

    title: str
    names: tuple[str, ...]
    unit: str = ""
    but: str = ""
    sums: bool = False  # show the sum over the steps so far
    marks: bool = False  # few points, each worth seeing
    smooth: bool = False  # a running mean beside the values
    expected: float | None = None  # the value of an exact run

    def metrics(self, present: Iterable[str]) -> list[str]:
        """Those of ``present`` that belong here, in the order of ``names``."""
        found = sorted(present)
        return list(dict.fromkeys(name for form in self.names for name in found if self._fits(name, form)))

    def _fits(self, name: str, form: str) -> bool:
        return fnmatchcase(name, form) and not fnmatchcase(name, self.but)


def _zero(title: str, *names: str, unit: str = "") -> Panel:
    return Panel(title, names, unit, expected=0.0)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Reward": (
        Panel("reward of a step's samples", ("critic/score/mean",), "score", smooth=True),
        Panel("validation", ("val-core/*",), "mean over prompts", marks=True),
        Panel("score after shaping", ("critic/rewards/mean",), "score", smooth=True),
        Panel("further rewards", ("reward/*/mean",), "mean", but="reward/time_s/*", smooth=True),
        Panel("further validation", ("val-aux/*",), "mean over prompts", marks=True),
        Panel("prompts whose samples all score the same", ("reward/frac_zero_std_groups",), "share"),
        Panel("graders that failed", ("reward/error_ratio", "reward/timeout_ratio"), "share of samples"),
    ),
    "Mismatch": (
        _zero("log-probabilities that differ in any bit", "bitwise/tokens_different", unit="tokens"),
        Panel("log-probabilities compared so far", ("bitwise/tokens_compared",), "tokens", sums=True),
        _zero("experts that differ", "bitwise/routes_different", unit="tokens"),
        Panel("experts compared so far", ("bitwise/routes_compared",), "tokens", sums=True),
        _zero("draws that came out differently", "bitwise/tokens_redrawn_different", unit="tokens"),
        _zero("largest distance of two log-probabilities", "bitwise/max_ulp", unit="units in the last place"),
        _zero("KL, rollout and training", "rollout_corr/k3_kl", "rollout_corr/kl", unit="nats"),
        _zero("difference of probabilities", "training/rollout_probs_diff_max", "training/rollout_probs_diff_mean"),
        Panel("staleness", ("rollout/staleness/*",), "weights versions"),
    ),
    "Policy": (
        Panel("entropy", ("actor/entropy",), "nats per token", smooth=True),
        Panel("gradient norm", ("actor/grad_norm",), "before clipping", smooth=True),
        Panel("clip fractions", ("actor/pg_clipfrac", "actor/pg_clipfrac_lower"), "share of tokens"),
        Panel("policy loss", ("actor/pg_loss",), smooth=True),
        Panel("KL", ("actor/ppo_kl", "actor/kl_loss", "actor/reward_kl_penalty"), "nats"),
        Panel("learning rate", ("actor/lr",)),
        Panel("skipped optimizer steps", ("actor/skipped_steps",)),
        Panel("load of the busiest expert over the mean", ("actor/moe_load_max_over_mean",)),
        Panel("experts without a token", ("actor/moe_idle_experts",), "share of the experts"),
        Panel("balance loss of the experts", ("actor/router_aux_loss",)),
    ),
    "Lengths": (
        Panel("response length", ("response_length/mean", "response_length/max"), "tokens", smooth=True),
        Panel("responses that reach the limit", ("response_length/clip_ratio",), "share"),
        Panel("prompt length", ("prompt_length/mean", "prompt_length/max"), "tokens"),
    ),
    "Speed and memory": (
        Panel(PARTS, ("timing_s/*",), "seconds"),
        Panel("throughput", ("perf/throughput",), "tokens / s / GPU", smooth=True),
        Panel("tokens sampled per second", ("rollout/decode_tokens_per_s",), "tokens / s", smooth=True),
        Panel("model FLOPs utilisation", ("perf/mfu/*",), "share of the peak", smooth=True),
        Panel("idle GPUs in the update", ("perf/idle_share/*",), "share"),
        Panel("memory", ("perf/*memory*_gb",), "GiB"),
        Panel("allocations tried again on a full GPU", ("perf/num_alloc_retries",), "in the step"),
        Panel("grading one sample", ("reward/time_s/mean", "reward/time_s/max"), "seconds"),
        Panel("key-value pages in use", ("rollout/kv_usage",), "share, at the peak"),
        Panel("requests pushed out and recomputed", ("rollout/preemptions",), "requests"),
    ),
}

# of another stage, of the whole, or at the same time
_INSIDE = re.compile(r"timing_s/(step|sync_weights|audit|audit_forward|weights_.*|gen_ahead|.*/.*)")
STAGES = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "testing", "save_checkpoint")
"""Of a step, in their order in it, as ``timing_s/…`` names them."""


def present_panels(present: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Section -> title -> the metrics of ``present`` that the panel shows; what shows none is left out.

    >>> present_panels(["actor/entropy", "timing_s/gen", "timing_s/step"])
    {'Policy': {'entropy': ['actor/entropy']}, 'Speed and memory': {'parts of a step': ['timing_s/gen']}}
    """
    names = list(present)
    found = {
        section: {panel.title: shown for panel in panels if (shown := _shown(panel, names))}
        for section, panels in SECTIONS.items()
    }
    return {section: panels for section, panels in found.items() if panels}


def _shown(panel: Panel, present: Sequence[str]) -> list[str]:
    return step_parts(present) if panel.title == PARTS else panel.metrics(present)


def step_parts(present: Iterable[str]) -> list[str]:
    """``timing_s/…`` that add up to a step, in their order in it.

    >>> step_parts(["timing_s/step", "timing_s/update_actor", "timing_s/audit", "timing_s/gen", "timing_s/mine"])
    ['timing_s/gen', 'timing_s/update_actor', 'timing_s/mine']
    """
    names = [name for name in present if name.startswith("timing_s/") and not _INSIDE.fullmatch(name)]
    order = {f"timing_s/{name}": place for place, name in enumerate(STAGES)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))
