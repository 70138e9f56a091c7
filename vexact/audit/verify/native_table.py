"""Parts (b) and (c) as lines of text: a row per pair of models, a column per figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vexact.audit.verify.gradients import Gradients
from vexact.audit.verify.logits import TOP_K, Closeness
from vexact.audit.verify.native import LEAST_ARGMAX, LEAST_COSINE, Native, NativeComparisons

_SHOWN_NAMES = 3
_LOGITS = ("argmax equal", "with ties", "with adjacent", f"top-{TOP_K}", "|diff| max", "mean")
_GRADIENTS = ("cosine", "norm ratio", "worst parameter")


def native_lines(native: NativeComparisons, dtype: str) -> list[str]:
    """Logits, gradients, and whether they agree."""
    pairs = _pairs(native, dtype)
    logits = [(name, *_closeness(pair.closeness)) for name, pair in pairs]
    gradients = [(name, *_gradients(pair.gradients)) for name, pair in pairs]
    ours = native.same.gradients
    return [
        "",
        *_aligned(("(b) logits", *_LOGITS), logits),
        "",
        *_aligned(("(c) gradients", *_GRADIENTS), gradients),
        f"    training side: {problems(ours) or _all_well(ours)}",
        "",
        agreement_line(native),
    ]


def agreement_line(native: NativeComparisons) -> str:
    """Yes or no, the thresholds, and the figures that miss them."""
    missed = []
    if not native.argmax >= LEAST_ARGMAX:
        closeness = native.same.closeness
        missed.append(f"argmax {percent(closeness.argmax_with_adjacent, closeness.positions)}")
    if not native.cosine >= LEAST_COSINE:
        missed.append(f"gradient cosine {_digits(native.cosine)}")
    rule = f"(argmax >= {100 * LEAST_ARGMAX:g} %, gradient cosine >= {LEAST_COSINE:g})"
    answer = "yes" if native.agrees else "no"
    return f"agrees with transformers: {answer} {rule}" + (f": {', '.join(missed)}" if missed else "")


def problems(gradients: Gradients) -> str:
    """Which parameters have no usable gradient; empty when all have."""
    parts = []
    for what, names in (
        ("non-finite", gradients.non_finite),
        ("zero", gradients.zero),
        ("without a token, but not zero,", gradients.stray),
    ):
        if names:
            parts.append(f"{what} in {_some(names)}")
    return "; ".join(parts)


def _all_well(gradients: Gradients) -> str:
    text = f"finite and non-zero in all {gradients.parameters} parameters"
    if gradients.idle_experts:
        text += f", zero in the {gradients.idle_experts} of {gradients.experts} experts that no token chose"
    if gradients.without_effect:
        text += f", but for {_some(gradients.without_effect)}: zero on both sides"
    return text


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def percent(part: int, whole: int) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{10000 * part // whole / 100:.2f} %" if whole else "nothing compared"


def _pairs(native: NativeComparisons, dtype: str) -> list[tuple[str, Native]]:
    pairs = [
        (f"training side, HF {dtype}", native.same),
        ("training side, HF float32", native.float32),
        (f"HF {dtype}, HF float32", native.yardstick),
    ]
    return [(f"    {name}", pair) for name, pair in pairs if pair is not None]


def _closeness(c: Closeness) -> tuple[str, ...]:
    counts = (c.argmax_equal, c.argmax_with_ties, c.argmax_with_adjacent)
    return (
        f"{counts[0]}/{c.positions} {percent(counts[0], c.positions)}",
        *(percent(count, c.positions) for count in counts[1:]),
        f"{100 * c.top_k_overlap:.2f} %",
        f"{c.max_abs_diff:.3g}",
        f"{c.mean_abs_diff:.3g}",
    )


def _gradients(g: Gradients) -> tuple[str, ...]:
    return _digits(g.cosine), f"{g.relative_norm:.6f}", f"{_digits(g.min_cosine)} {g.min_cosine_parameter}"


def _digits(cosine: float) -> str:
    """Six digits, rounded down, so that what is shown passes a threshold only when the figure does."""
    return f"{math.floor(cosine * 1e6) / 1e6:.6f}" if math.isfinite(cosine) else str(cosine)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    cells = ((f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return ["  ".join(row).rstrip() for row in cells]
