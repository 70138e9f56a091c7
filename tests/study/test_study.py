"""The study's program: two runs end to end, what a kill leaves, its results and its page."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from grid import read_grid
from page import replace_between, studies, with_tables
from processes import PATIENCE_S, ending, marked, start, until
from results import read_results, write_results
from runner import read_rows
from study_rows import row

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
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


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
    assert (tmp_path / "pictures" / "study_tiny.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_a_study_that_is_terminated_takes_its_runs_with_it(tmp_path):
    grid = yaml.safe_load(small_grid(tmp_path / "grid.yaml").read_text(encoding="utf-8"))
    grid["subjects"]["dense"]["steps"] = 100_000
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    mark, work = f"study-{tmp_path}", tmp_path / "work"
    command = [sys.executable, STUDY / "study.py", "run", "--grid", tmp_path / "grid.yaml", "--work", work]
    with ending(mark):
        process = start([str(word) for word in command], mark)
        assert until(lambda: len(list((work / "runs").glob("*/train/metrics.jsonl"))) == 2), process.poll()
        assert len(marked(mark)) > 2
        process.terminate()
        assert process.wait(PATIENCE_S) == 143
        assert until(lambda: not marked(mark))
    assert read_rows(work / "results.jsonl") == []


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


def test_results_come_back_as_they_were(tmp_path):
    rows = [row("none", seed, 0.1 * seed) for seed in (2, 1)]
    again = row("none", 2, 0.2, part="q", wall_s=9.0)
    write_results([*rows, again], tmp_path / "r.parquet")
    first, second = read_results(tmp_path / "r.parquet")
    assert (first["seed"], second["seed"], second["part"]) == (1, 2, "p"), "the same run in two parts is the first's"
    assert json.loads(first["environment"]) == {"versions": {}, "device": "cpu", "commit": None}
    assert first["reward"] == rows[1]["reward"]


def test_results_of_two_files_are_put_together_and_never_one_in_the_place_of_another(tmp_path):
    kept, both = tmp_path / "kept.parquet", tmp_path / "both.parquet"
    write_results([row("none", 1, 0.1)], kept)
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps(row("none", seed, 0.1 * seed)) + "\n" for seed in (1, 2)), encoding="utf-8")
    collected = study("collect", kept, new, "--out", both)
    assert collected.returncode == 0, collected.stderr
    assert collected.stdout.endswith("2 different runs\n")
    other = row("none", 1, 0.1, reward=[0.5] * 19 + [0.4])
    with pytest.raises(ValueError, match="the run none-1 is there twice with different results"):
        write_results([*read_results(kept), other], both)
    assert len(read_results(both)) == 2, "a refusal writes nothing"
    missing = study("collect", tmp_path / "absent.jsonl", "--out", both)
    assert (missing.returncode, missing.stderr) == (2, f"study.py: {tmp_path / 'absent.jsonl'} is no file\n")


def test_a_part_counts_its_own_seeds_alone():
    rows = read_results(STUDY / "results.parquet")
    copied = [
        each | {"seed": each["seed"] + 90, "id": f"{each['id']}x"} for each in rows if each["part"] == "replication"
    ]
    assert studies([*rows, *copied], GRID)["replication"].seeds == [1, 2, 3, 4, 5]


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
