"""What a dashboard keeps of a metric when the run is over."""

from __future__ import annotations

from fnmatch import fnmatchcase

from vexact.report.names import is_expected_zero

_KEPT = (  # the first that fits; the last value of all others
    ("critic/score/mean", "last,max"),
    ("val-core/*", "last,max"),
    ("actor/grad_norm", "max"),
    ("reward/error_ratio", "max"),
    ("reward/timeout_ratio", "max"),
    ("perf/*memory*_gb", "max"),
    ("perf/num_alloc_retries", "max"),
    ("perf/throughput", "mean"),
    ("perf/mfu/*", "mean"),
    ("rollout/decode_tokens_per_s", "mean"),
    ("timing_s/*", "mean"),
    ("bitwise/weights_checksum_ok", "min"),
    ("training/rollout_probs_diff_valid", "min"),
)


def summary_of(name: str) -> str:
    """``min``, ``max``, ``mean`` and ``last``, joined by commas. What has to be 0 keeps its maximum: one step in ten
    thousand is not forgotten.

    >>> summary_of("bitwise/tokens_different"), summary_of("val-core/gsm8k/acc/mean@1"), summary_of("actor/lr")
    ('max', 'last,max', 'last')
    """
    if is_expected_zero(name):
        return "max"
    return next((kept for form, kept in _KEPT if fnmatchcase(name, form)), "last")
