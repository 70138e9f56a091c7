"""What a page claims holds for all of the run, or the page says for how much of it."""

import json
import os

import pytest
from test_report_html import page_of
from test_report_html_inputs import data_of
from written_run import config, group, row, write_run

from vexact.cli import main
from vexact.report import write_samples
from vexact.report.html import read_run
from vexact.report.html.groups import grouped
from vexact.report.html.record import told_apart

EVERY = "0 in every step, as it has to be"


def uncompared(step: int) -> dict:
    """The row of a step that was not audited."""
    kinds = ("bitwise/", "rollout_corr/", "training/")
    return {name: value for name, value in row(step).items() if not name.startswith(kinds)}


def test_steps_that_were_not_compared_are_not_called_equal(tmp_path):
    page = page_of(write_run(tmp_path / "run", [uncompared(1), row(2), row(3), uncompared(4)]))
    assert EVERY not in page.text
    assert "0 in the 2 of 4 steps that have a value" in page.text
    assert "0 / 200 in 2 of 4 steps" in page.text
    assert EVERY in page_of(write_run(tmp_path / "whole")).text


def test_a_run_without_an_audit_beside_one_with(tmp_path):
    exact = write_run(tmp_path / "exact")
    other = write_run(tmp_path / "off", [uncompared(step) for step in (1, 2, 3, 4)], exactness="off")
    page = page_of(exact, other)
    assert EVERY not in page.text
    assert "0 in the 4 of 8 steps that have a value" in page.text


def test_a_step_that_an_error_stopped_is_not_done(tmp_path):
    stopped = {"step": 4, "training/global_step": 4, "bitwise/tokens_compared": 9, "bitwise/tokens_different": 1}
    page = page_of(write_run(tmp_path / "run", [row(1), row(2), row(3), stopped]))
    assert "stopped in step 4 of 4" in page.text


@pytest.mark.parametrize("key", ["data", "rollout"])
def test_a_seed_that_is_written_out_is_the_one_it_stands_for(tmp_path, key):
    runs = []
    for name, seed in (("null", None), ("same", 7), ("other", 8)):
        settings = config(seed=7)
        place = settings if key == "data" else settings["actor_rollout_ref"]
        place.setdefault(key, {})["seed"] = seed
        runs.append(read_run(write_run(tmp_path / name, settings=settings)))
    assert runs[0].seed == runs[1].seed != runs[2].seed
    (both,) = grouped(runs[:2])
    assert both.num_seeds == 1
    assert not both.band("critic/score/mean").has_interval


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [read_run(write_run(tmp_path / place / "run", seed=seed)) for seed, place in enumerate("ab")]
    runs.append(read_run(write_run(tmp_path / "a" / "else")))
    assert [run.name for run in told_apart(runs)] == ["a/run", "b/run", "else"]
    assert [run["run"] for run in data_of(*(run.path for run in runs))["samples"]] == ["a/run", "b/run", "else"]


def test_samples_that_are_left_out_are_said_to_be(tmp_path):
    run = write_run(tmp_path / "run")
    write_samples(run, 3, [group("x") for _ in range(64)])
    write_samples(run, 4, [group("x") for _ in range(65)])
    third, fourth = data_of(run)["samples"][0]["shown"]
    assert (len(third["samples"]), third["more"]) == (64, False)
    assert (len(fourth["samples"]), fourth["more"]) == (64, True)


def test_tokens_that_differ_count_where_they_are_not_shown(tmp_path):
    run = write_run(tmp_path / "run")
    texts = {"response": "a" * 9000, "prompt": "b" * 4001}
    tokens = {"token_lengths": [1] * 9000, "logprobs": [-1.0] * 9000, "different": [3, 8500, True, "4", -1]}
    (run / "samples" / "step_4.jsonl").write_text(json.dumps(texts | tokens) + "\n")
    (sample,) = data_of(run)["samples"][0]["shown"][0]["samples"]
    assert sum(len(token) > 2 for token in sample["tokens"]) == 1
    assert sample["different"] == 2
    assert sample["cut"] == {"prompt": 1, "response": 1000}


def test_a_page_replaces_a_page_and_nothing_else(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "config.yaml"):
        before = (run / name).read_bytes()
        assert main(["report", str(run), "--out", str(run / name)]) == 2
        assert f"{run / name} is there and is no report" in capsys.readouterr().err
        assert (run / name).read_bytes() == before
    os.mkfifo(tmp_path / "pipe")  # as /dev/stdout is one
    assert main(["report", str(run), "--out", str(tmp_path / "pipe")]) == 2
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "empty.html").touch()
    (tmp_path / "link.html").symlink_to(tmp_path / "empty.html")
    assert main(["report", str(run), "--out", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "empty.html").stat().st_size > 1e6
    assert main(["report", str(run), "--out", str(tmp_path / "empty.html")]) == 0


def test_two_may_write_one_page(tmp_path):
    run = write_run(tmp_path / "run")
    (run / ".report.html.tmp").write_text("half of what another process writes")
    assert main(["report", str(run)]) == 0
    assert (run / ".report.html.tmp").exists()
    assert not [file for file in run.iterdir() if file.name.endswith(f".{os.getpid()}.tmp")]


def test_steps_that_are_missing_are_counted(tmp_path):
    run = write_run(tmp_path / "run", [row(2), row(3), row(7)])
    assert "metrics.jsonl lacks 3 of the steps that were trained" in read_run(run).problems
    whole = write_run(tmp_path / "whole", [row(5), row(6)])  # as one that goes on from another directory
    assert not [problem for problem in read_run(whole).problems if "lacks" in problem]


@pytest.mark.parametrize("content", ["", "[1]", "null", "3", "a: [{2020-01-01: 1}]", "a: &x [*x]"])
def test_a_configuration_that_is_none_is_named(tmp_path, content):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(content)
    assert any(problem.startswith("config.yaml cannot be read: ") for problem in read_run(run).problems)
    assert "config.yaml cannot be read" in page_of(run).text
