"""How far the study's verdicts can be relied on: the hypotheses of its confirmation, and all verdicts at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from analysis import EXACT, LEAST_SEEDS, LEVEL, SMALL_EFFECT, UNCORRECTED, Cell, Study, exact_cell
from bands import Band, holm, student_band, student_p

OUTCOME = "exact_score"
CONFIRMATION = "confirmation"
TESTED_LEVEL = 0.05
ROUNDING = ("bf16_logits", "k_order", "softmax_blocks", "stock")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """About the exact score of ``cell`` less that of ``reference``.

    Attributes:
        sign: of the difference; 0 says that there is none of ``SMALL_EFFECT``.
    """

    cell: Cell
    reference: Cell
    sign: int


def _fresh(lr: float, mode: str, correction: str = UNCORRECTED) -> Cell:
    return "fresh", "grpo", lr, mode, correction


STABLE, HIGH = 3e-4, 1e-3
HYPOTHESES = (
    Hypothesis(_fresh(STABLE, "noise_2"), _fresh(STABLE, EXACT), -1),
    Hypothesis(_fresh(HIGH, "noise_2"), _fresh(HIGH, EXACT), -1),
    Hypothesis(_fresh(STABLE, "noise_2", "tis"), _fresh(STABLE, "noise_2"), -1),
    Hypothesis(_fresh(HIGH, "noise_2", "tis"), _fresh(HIGH, "noise_2"), -1),
    Hypothesis(_fresh(HIGH, "one_step_off"), _fresh(HIGH, EXACT), -1),
    Hypothesis(_fresh(HIGH, "one_step_off", "tis"), _fresh(HIGH, "one_step_off"), +1),
    Hypothesis(_fresh(STABLE, "bf16_logits"), _fresh(STABLE, EXACT), 0),
    Hypothesis(_fresh(HIGH, "bf16_logits"), _fresh(HIGH, EXACT), 0),
)
"""Registered in docs/study.md before the runs that they are about."""


def hypotheses_table(study: Study) -> str:
    """Of the confirmation's runs: every hypothesis with its band by Student's t, its p and whether it is confirmed."""
    lines = [
        f"{len(study.seeds)} seeds:",
        "",
        "| | learning rate | | difference of the exact score | p | p after Holm | |",
        "|---|---|---|---|---|---|---|",
    ]
    found = [study.differences(each.cell, each.reference, OUTCOME) for each in HYPOTHESES]
    signed = [number for number, each in enumerate(HYPOTHESES) if each.sign]
    p_values = {number: student_p(found[number]) for number in signed}
    adjusted = dict(zip(signed, holm(list(p_values.values())), strict=True))
    for number, hypothesis in enumerate(HYPOTHESES):
        band = student_band(found[number], LEVEL)
        if hypothesis.sign:
            p = [f"{p_values[number]:.2g}", f"{adjusted[number]:.2g}"]
            confirmed = adjusted[number] < TESTED_LEVEL and band.mean * hypothesis.sign > 0
        else:
            p = ["–", "–"]
            confirmed = band.low >= -SMALL_EFFECT and band.high <= SMALL_EFFECT
        verdict = "few" if len(study.seeds) < LEAST_SEEDS else "**confirmed**" if confirmed else "not confirmed"
        entries = [str(number + 1), f"{hypothesis.cell[2]:g}", _against(hypothesis), _interval(band), *p, verdict]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def multiplicity_table(parts: Mapping[str, Study]) -> str:
    """Every verdict ``seen`` with its band by Student's t, and its p after Holm's correction for all comparisons of all
    parts but the confirmation, which has its own."""
    asked = [
        (name, study, cell, reference)
        for name, study in parts.items()
        if name != CONFIRMATION and len(study.seeds) >= LEAST_SEEDS
        for cell, reference in study.comparisons()
    ]
    p_values = [student_p(study.differences(cell, reference, OUTCOME)) for _, study, cell, reference in asked]
    lines = []
    for p, adjusted, (name, study, cell, reference) in sorted(
        zip(p_values, holm(p_values), asked, strict=True), key=lambda row: row[0]
    ):
        effect = study.effect(cell, reference, OUTCOME)
        if effect is not None and effect.verdict == "seen":
            band = student_band(study.differences(cell, reference, OUTCOME), LEVEL)
            entries = [name, cell[1], f"{cell[2]:g}", _against(Hypothesis(cell, reference, 0)), _interval(band)]
            mark = "**" if adjusted < TESTED_LEVEL else ""
            lines.append(f"| {' | '.join([*entries, f'{p:.2g}', f'{mark}{adjusted:.2g}{mark}'])} |")
    certain = sum("**" in line for line in lines)
    return "\n".join(
        [
            f"{len(asked)} comparisons, {len(lines)} seen, {certain} with p < {TESTED_LEVEL} after Holm:",
            "",
            "| part | | learning rate | | difference of the exact score | p | p after Holm |",
            "|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def rounding_table(parts: Mapping[str, Study]) -> str:
    """Every comparison of a disagreement the size of rounding with exact runs, by bootstrap and by Student's t."""
    lines = [
        "| part | | learning rate | | KL | seeds | difference, bootstrap | | by Student's t | within ±0.05 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, study in parts.items():
        for cell in study.cells:
            effect = study.effect(cell, exact_cell(cell), OUTCOME) if cell[3] in ROUNDING else None
            if effect is None or len(study.seeds) < LEAST_SEEDS:
                continue
            band = student_band(study.differences(cell, exact_cell(cell), OUTCOME), LEVEL)
            what = f"`{cell[3]}`" if cell[4] == UNCORRECTED else f"`{cell[3]}` `{cell[4]}`"
            within = "yes" if band.low >= -SMALL_EFFECT and band.high <= SMALL_EFFECT else "no"
            entries = [name, cell[1], f"{cell[2]:g}", what, f"{study.band(cell, 'kl').mean:.1e}", str(len(study.seeds))]
            entries += [_interval(effect.wide), effect.verdict, _interval(band), within]
            lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def _against(hypothesis: Hypothesis) -> str:
    names = [
        f"`{mode}`" if mode == EXACT else f"`{mode}` `{correction}`"
        for *_, mode, correction in (hypothesis.cell, hypothesis.reference)
    ]
    return " against ".join(names)


def _interval(band: Band) -> str:
    return f"{band.mean:+.3f} ({band.low:+.3f} … {band.high:+.3f})"
