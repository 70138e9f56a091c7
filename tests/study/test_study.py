"""The study's program: two runs end to end, what a kill leaves, and an analysis that can be done by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from analysis import Study
from bands import band, difference
from grid import read_grid
from outcomes import count_spikes, has_collapsed, outcomes, steps_to
from page import part_table, replace_between, with_tables
from results import read_results, write_results
from runner import read_rows

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
GRID = STUDY / "grid.yaml"


def small_grid(path: Path) -> Path:
    """Two runs of two steps each, of a subject that has learned nothing."""
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    subject = grid["subjects"]["dense"]
    subject["steps"], subject["threshold"] = 2, 0.5
    subject["prepare"] |= {"right_steps": 1, "doubtful_steps": 1, "terms": 3, "prompts": 64}
    subject["overrides"] += ["data.train_batch_size=4", "actor_rollout_ref.rollout.n=2"]
    grid["parts"] = {
        "tiny": {
            "subject": ["dense"],
            "mode": ["none", "noise_1"],
            "correction": ["tis", "uncorrected"],
            "algorithm": ["grpo"],
            "lr": [1e-3],
            "seed": [1],
        }
    }
    grid["skip"].append({"mode": "noise_1", "correction": "uncorrected"})
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    return path


def study(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(STUDY / "study.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_two_runs_end_to_end_and_the_one_that_a_kill_lost_again(tmp_path):
    grid, work = small_grid(tmp_path / "grid.yaml"), tmp_path / "work"
    first = study("run", "--grid", grid, "--work", work, "--workers", 2)
    assert first.returncode == 0, first.stderr
    rows = {row["mode"]: row for row in read_rows(work / "results.jsonl")}
    exact, noisy = rows["none"], rows["noise_1"]
    assert len(exact["reward"]) == len(noisy["reward"]) == 2
    assert exact["status"] == noisy["status"] == "done"
    assert 0 <= exact["exact_score"] <= 1
    assert exact["tokens_different"] == [0, 0]
    assert noisy["tokens_different"][0] > 0.9 * noisy["tokens_compared"][0] > 0
    assert math.isnan(exact["effective_samples"][0])
    assert 0 < noisy["effective_samples"][0] < 1
    assert not list((work / "runs").iterdir()), "what is recorded is not kept twice"

    results = work / "results.jsonl"
    kept, lost = results.read_text(encoding="utf-8").splitlines(keepends=True)
    results.write_text(kept + lost[:100], encoding="utf-8")
    (work / "runs" / json.loads(lost)["id"]).mkdir()
    (work / "runs" / json.loads(lost)["id"] / "half").touch()
    again = study("run", "--grid", grid, "--work", work, "--workers", 1)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("\n") == 1, "the run that was recorded is not run again"
    repeated = {row["id"]: row for row in read_rows(results)}
    assert repeated.keys() == {exact["id"], noisy["id"]}
    before = json.loads(lost)
    assert repeated[before["id"]]["grad_norm"] == before["grad_norm"], "the same run has the same bits"

    assert study("collect", results, "--out", tmp_path / "results.parquet").returncode == 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study:tiny -->\n<!-- /study:tiny -->\nafter\n", encoding="utf-8")
    written = study("write", tmp_path / "results.parquet", "--grid", grid, "--page", page)
    assert written.returncode == 0, written.stderr
    assert "| `noise_1` | `tis` |" in page.read_text(encoding="utf-8")
    assert (tmp_path / "study_tiny.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_a_run_that_cannot_start_fails_and_keeps_its_log(tmp_path):
    grid = yaml.safe_load(small_grid(tmp_path / "grid.yaml").read_text(encoding="utf-8"))
    grid["modes"]["noise_1"]["overrides"] = ["actor_rollout_ref.rollout.mismatch.mode=unheard_of"]
    grid["skip"].append({"mode": "none"})
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    ended = study("run", "--grid", tmp_path / "grid.yaml", "--work", tmp_path / "work", "--workers", 1)
    assert ended.returncode == 1
    assert "failed, see" in ended.stdout
    (log,) = (tmp_path / "work" / "runs").glob("*/log.txt")
    assert "unheard_of" in log.read_text(encoding="utf-8")
    assert read_rows(tmp_path / "work" / "results.jsonl") == []


def row(mode: str, seed: int, score: float, **changes) -> dict:
    return {
        "id": f"{mode}-{seed}",
        "part": "p",
        "subject": "s",
        "mode": mode,
        "correction": "uncorrected",
        "algorithm": "grpo",
        "lr": 0.1,
        "seed": seed,
        "status": "done",
        "steps": 20,
        "exact_score": score,
        "wall_s": 1.0,
        "cpu_s": 1.0,
        "environment": '{"versions": {}, "device": "cpu", "commit": null, "threads": 1}',
        "reward": [0.5] * 20,
        "grad_norm": [1.0] * 20,
        "entropy": [1.0] * 20,
        "k3_kl": [0.0] * 20,
        "probs_diff": [0.0] * 20,
        "tokens_compared": [10.0] * 20,
        "tokens_different": [0.0] * 20,
        "routes_different": [math.nan] * 20,
        "ppo_kl": [0.5] * 20,
        "clip_fraction": [0.0] * 20,
        "effective_samples": [math.nan] * 20,
        "rejected": [math.nan] * 20,
        "skipped_steps": [0.0] * 20,
        "length": [9.0] * 20,
    } | changes


def cells(*modes: str) -> list:
    return [("s", "grpo", 0.1, mode, "uncorrected") for mode in modes]


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
    # differences are taken seed by seed, over the seeds of both
    assert difference({1: 0.5, 2: 0.7, 3: 9.0}, {1: 0.4, 2: 0.6, 4: 0.0}, 0.95) == pytest.approx((0.1, 0.1, 0.1, 2))
    assert difference({1: 0.5}, {2: 0.5}, 0.95) is None


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
    assert (found["exact_score"], found["final_reward"], found["collapsed"]) == (0, 0, 1)
    mixed = row("x", 1, 0.3, tokens_different=[5.0] * 20, k3_kl=[math.nan, *[0.2] * 19])
    assert outcomes(mixed, 0.5)["share_different"] == 0.5
    assert outcomes(mixed, 0.5)["kl"] == 0.2
    stale = outcomes(row("x", 1, 0.3, tokens_compared=[10.0, *[math.nan] * 19]), 0.5)
    assert stale["kl"] == 0.5, "of other weights by design: that of the update"
    assert math.isnan(stale["share_different"])


def test_results_come_back_as_they_were(tmp_path):
    rows = [row("none", seed, 0.1 * seed) for seed in (2, 1)]
    write_results([*rows, row("none", 2, 0.9)], tmp_path / "r.parquet")
    first, second = read_results(tmp_path / "r.parquet")
    assert (first["seed"], second["exact_score"]) == (1, 0.9)
    assert json.loads(first["environment"]) == {"versions": {}, "device": "cpu", "commit": None}
    assert first["reward"] == rows[1]["reward"]


def test_the_grid_names_every_run_once_and_seed_by_seed():
    specs = read_grid(GRID)
    assert len({spec.id for spec in specs}) == len(specs)
    primary = read_grid(GRID, ["primary"])
    assert len(primary) == 2 * 5 * (1 + 9 * 2)
    assert [spec.seed for spec in primary] == sorted(spec.seed for spec in primary)
    assert not [spec for spec in specs if spec.mode == "none" and spec.correction != "uncorrected"]
    with pytest.raises(ValueError, match="no part 'secondary'; its parts: primary"):
        read_grid(GRID, ["secondary"])


def test_a_grid_that_names_what_it_does_not_have_says_where(tmp_path):
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    grid["parts"]["primary"]["mode"] = ["nois"]
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    with pytest.raises(ValueError, match=r"modes has no 'nois'; it has .*none"):
        read_grid(path)
    del grid["skip"], grid["modes"]
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    with pytest.raises(ValueError, match="must have the keys algorithms, common"):
        read_grid(path)


def test_the_page_holds_what_the_committed_results_say():
    text = (STUDY.parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    assert with_tables(text, read_results(STUDY / "results.parquet"), GRID) == text
    with pytest.raises(ValueError, match="has no <!-- /study:x --> after it"):
        replace_between("<!-- study:x -->", "x", "")
