"""The study's analysis of rows made by hand, against tables and rules that can be checked by hand."""

import math

import numpy as np
import pytest
from analysis import Study
from bands import band, holm, student_band, student_p
from certainty import HYPOTHESES, hypotheses_table, multiplicity_table, rounding_table
from outcomes import count_spikes, has_collapsed, outcomes, steps_to
from page import part_table, weights_table
from study_rows import cells, row


def test_bands_of_a_table_made_by_hand():
    # two seeds: a resample is (a, a), (a, b), (b, a) or (b, b), so a quarter of the means is each end
    found = band([0.2, 0.4], 0.95)
    assert found == pytest.approx((0.3, 0.2, 0.4, 2))
    # three equal values have no spread, and one seed has none either
    assert band([0.7, 0.7, 0.7], 0.99) == pytest.approx((0.7, 0.7, 0.7, 3))
    assert band([0.7], 0.95) == pytest.approx((0.7, 0.7, 0.7, 1))
    # four values, 3 of them 0: means 0, 1/4, 2/4, … with probabilities C(4, k) 3^(4-k) / 4^4. P(0) = 0.316, and
    # P(>= 3/4) = 0.0508, P(1) = 0.0039: the 95 % band ends at 3/4, the 99.9 % band at 1
    assert band([0, 0, 0, 1], 0.95)[:3] == pytest.approx((0.25, 0.0, 0.75))
    assert band([0, 0, 0, 1], 0.999)[:3] == pytest.approx((0.25, 0.0, 1.0))


def test_students_t_and_holm_against_printed_tables():
    # mean 3, deviation sqrt(2.5); t of 4 degrees of freedom is 2.7764 at 95 % and 4.6041 at 99 %
    assert student_band([1, 2, 3, 4, 5], 0.95) == pytest.approx((3, 3 - 1.96325, 3 + 1.96325, 5), abs=1e-4)
    assert student_band([1, 2, 3, 4, 5], 0.99).high - 3 == pytest.approx(4.6041 * math.sqrt(0.5), abs=1e-3)
    # eight values have 7 degrees of freedom (2.3646), of which the formula is another one
    eight = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert student_band(eight, 0.95).low == pytest.approx(0.5 - 2.3646 * math.sqrt(2 / 7 / 8), abs=1e-4)
    assert student_band([1, 2], 0.95).high == pytest.approx(1.5 + 12.706 * 0.5, abs=1e-2)
    assert student_p([1, -1]) == pytest.approx(1)
    assert student_p([0, 2]) == pytest.approx(0.5)  # t = 1, one degree: 1 - 2 atan(1) / pi
    assert student_p([1, 2, 3, 4, 5]) == pytest.approx(0.01324, abs=1e-4)  # t = 4.2426
    assert (student_p([0.0, 0.0]), student_p([0.1, 0.1])) == (1, 0)
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and none less than those before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]


def test_hypotheses_are_confirmed_by_the_registered_rule():
    less = {
        ("none", "uncorrected"): (0.0, 0.0, 0.0, 0.0),
        ("noise_2", "uncorrected"): (0.20, 0.21, 0.20, 0.21),
        ("noise_2", "tis"): (0.1, 0.3, 0.1, 0.31),  # against uncorrected on both sides of 0
        ("one_step_off", "uncorrected"): (0.3, 0.3, 0.31, 0.3),
        ("one_step_off", "tis"): (0.4, 0.41, 0.4, 0.4),  # less than uncorrected, where more is said
        ("bf16_logits", "uncorrected"): (0.01, -0.01, 0.0, 0.01),
    }
    cells = list(dict.fromkeys(cell for each in HYPOTHESES for cell in (each.cell, each.reference)))
    rows = []
    for cell in cells:
        subject, algorithm, lr, mode, correction = cell
        at = {"subject": subject, "algorithm": algorithm, "lr": lr, "correction": correction}
        for seed, change in enumerate(less[cell[3:]]):
            wild = 10 if cell[2:4] == (1e-3, "bf16_logits") else 1
            rows.append(row(mode, seed, 0.7 - change * wild, **at))
    found = Study(rows, {"fresh": 0.5}, cells)
    lines = [line.split(" | ") for line in hypotheses_table(found).splitlines() if "against" in line]
    verdicts = [line[-1].strip(" |*") for line in lines]
    assert verdicts == ["confirmed"] * 2 + ["not confirmed"] * 2 + ["confirmed"] + ["not confirmed"] + [
        "confirmed",
        "not confirmed",
    ]
    # all six p values are adjusted together: the largest times 1, or what those before it have
    assert float(lines[2][-2]) == pytest.approx(float(lines[2][-3]), rel=0.5)
    assert float(lines[4][-2]) == pytest.approx(6 * float(lines[4][-3]), rel=0.1)
    three = Study([row for row in rows if row["seed"] < 3], {"fresh": 0.5}, cells)
    assert hypotheses_table(three).count("| few |") == 8


def test_every_verdict_is_weighed_with_all_comparisons():
    scores = {"none": (0.5, 0.5, 0.5, 0.5), "a": (0.3, 0.31, 0.3, 0.3), "b": (0.5, 0.51, 0.5, 0.5)}
    rows = [row(mode, seed, score) for mode, all_seeds in scores.items() for seed, score in enumerate(all_seeds)]
    part = Study(rows, {"s": 0.4}, cells(*scores))
    few = Study([row for row in rows if row["seed"] < 3], {"s": 0.4}, cells(*scores))
    table = multiplicity_table({"part": part, "few": few, "confirmation": part})
    assert table.startswith("2 comparisons, 1 seen, 1 with p < 0.05 after Holm:")
    assert table.count(" against ") == 1, "only what is seen has a line"
    (line,) = [line for line in table.splitlines() if "`a`" in line]
    p, adjusted = (float(entry.strip(" |*")) for entry in line.split(" | ")[-2:])
    assert adjusted == pytest.approx(2 * p, rel=0.1)


def test_what_a_correction_leaves_is_averaged_over_steps_and_seeds():
    nothing = [math.nan] * 20
    rows = [row("none", seed, 0.5, effective_samples=nothing) for seed in (1, 2)]
    rows += [row("noise_1", 1, 0.5, effective_samples=[0.5] * 10 + nothing[:10], rejected=[0.25] * 20)]
    rows += [row("noise_1", 2, 0.5, effective_samples=[0.7] * 10 + nothing[:10], rejected=[0.75] * 20)]
    none, noise = weights_table(Study(rows, {"s": 0.4}, cells("none", "noise_1"))).splitlines()[2:]
    assert none == "| 0.1 | `none` |  | – | – | 0 | 1.00 | 1.00 |"
    assert noise == "| 0.1 | `noise_1` | `uncorrected` | 60% | 50% | 0 | 1.00 | 1.00 |"


def test_rounding_is_small_only_where_the_band_says_so():
    scores = {
        "none": (0.5,) * 4,
        "k_order": (0.49, 0.5, 0.51, 0.5),
        "stock": (0.46, 0.54, 0.46, 0.54),
        "noise_1": (0.1,) * 4,
    }
    rows = [row(mode, seed, score) for mode, all_seeds in scores.items() for seed, score in enumerate(all_seeds)]
    lines = rounding_table({"p": Study(rows, {"s": 0.4}, cells(*scores))}).splitlines()[2:]
    found = [[entry.strip() for entry in line.split("|")] for line in lines]
    assert [entries[4] for entries in found] == ["`k_order`", "`stock`"], "noise is not rounding"
    # a bootstrap never leaves the range of its values; t of 3 degrees of freedom is 3.182
    assert [(entries[8], entries[10]) for entries in found] == [("small", "yes"), ("small", "no")]
    assert found[1][9] == "+0.000 (-0.073 … +0.073)"


def test_verdicts_follow_the_registered_rule():
    scores = {
        "none": (0.5, 0.6, 0.7, 0.7),
        "worse": (0.4, 0.5, 0.5, 0.5),  # -0.1, -0.1, -0.2, -0.2: the 99 % band excludes 0
        "same": (0.51, 0.59, 0.7, 0.7),  # within 0.05
        "wild": (0.3, 0.9, 0.7, 0.7),  # -0.2, +0.3, 0, 0
        "hardly": (0.49, 0.59, 0.69, 0.69),  # excludes 0, but by 0.01
    }
    rows = [row(mode, seed, score) for mode, all_seeds in scores.items() for seed, score in enumerate(all_seeds)]
    rows.append(row("wild", 7, 0.0))  # a seed that others lack
    found = Study(rows, {"s": 0.4}, cells(*scores, "absent"))
    assert found.seeds == [0, 1, 2, 3]
    assert found.missing == cells("absent")
    none, *others = cells(*scores)
    effects = [found.effect(cell, none, "exact_score") for cell in others]
    assert [effect.verdict for effect in effects] == ["seen", "small", "open", "small"]
    assert effects[0].wide == pytest.approx((-0.15, -0.2, -0.1, 4))
    assert found.effect(cells("absent")[0], none, "exact_score") is None
    assert part_table(found).count("**seen**") == 1
    three = Study([row for row in rows if row["seed"] < 3], {"s": 0.4}, cells(*scores))
    assert three.effect(others[0], none, "exact_score").verdict == "few"


def test_outcomes_of_curves_made_by_hand():
    rising = np.concatenate([np.zeros(4), np.linspace(0.1, 1.0, 10), np.ones(6)])
    # means of five steps: 0.7 + … + 1.1; steps 9 to 13 hold 0.5, 0.6, 0.7, 0.8, 0.9
    assert steps_to(rising, 0.7) == 13
    assert steps_to(rising, 1.01) == 21
    assert not has_collapsed(rising)
    assert has_collapsed(np.concatenate([np.ones(10), np.full(10, 0.49)]))
    assert not has_collapsed(np.concatenate([np.ones(10), np.full(10, 0.51)]))
    assert count_spikes([1.0] * 10 + [3.1, 2.9, math.inf, 1.0]) == 2
    assert count_spikes([9.0, 1.0] * 5) == 0, "the first ten have nothing to be compared with"
    died = row("x", 1, math.nan, status="stopped: numbers that are none", reward=[1.0] * 10)
    found = outcomes(died, 0.5)
    assert (found["exact_score"], found["final_reward"], found["collapsed"], found["fallen"]) == (0, 0, 1, 1)
    never = outcomes(row("x", 1, 0.0, reward=[0.09] * 10 + [0.0] * 10), 0.5)
    assert (never["collapsed"], never["fallen"]) == (1, 0), "it has nothing to fall from"
    mixed = row("x", 1, 0.3, tokens_different=[5.0] * 20, k3_kl=[math.nan, *[0.2] * 19])
    assert outcomes(mixed, 0.5)["share_different"] == 0.5
    assert outcomes(mixed, 0.5)["kl"] == 0.2
    stale = outcomes(row("x", 1, 0.3, tokens_compared=[10.0, *[math.nan] * 19]), 0.5)
    assert stale["kl"] == 0.5, "of other weights by design: that of the update"
    assert math.isnan(stale["share_different"])
