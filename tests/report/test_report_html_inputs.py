"""A page is made of whatever a run left; what is no run is refused."""

import json
import os
import re

import pytest
import yaml
from test_report_html import page_of
from written_run import group, row, write_run

from vexact.cli import main
from vexact.report import write_samples
from vexact.report.html import FILE_NAME, NoRunError, read_run, write_report
from vexact.report.html.page import render


def data_of(*directories) -> dict:
    """The data of a page, which a whole parser takes long to find."""
    text = render([read_run(directory) for directory in directories])
    return json.loads(re.search(r'<script type="application/json" id="data">([^<]*)</script>', text)[1])


def test_a_run_that_is_killed_or_goes_on(tmp_path):
    run = write_run(tmp_path / "run", total_training_steps=9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "critic/sco')
    record = read_run(run)
    assert (record.last_step, record.total_steps) == (4, 9)
    assert "metrics.jsonl: line 5 left out: no JSON object with a step (cut off, or not ours)" in record.problems
    page = page_of(run)
    assert "4 of 9: stopped early, or still running" in page.text
    assert "line 5 left out" in page.text


def test_a_run_before_its_first_step(tmp_path):
    run = write_run(tmp_path / "run", rows=[])
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    assert "none yet" in page.text
    assert page.data["figures"] == []


def test_a_step_that_was_repeated_has_its_later_values(tmp_path):
    run = write_run(tmp_path / "run", [row(2), row(1), {"step": 2, "critic/score/mean": 0.5}])
    series = read_run(run).series
    assert series["critic/score/mean"].steps.tolist() == [1, 2]
    assert series["critic/score/mean"].values.tolist() == [0.01, 0.5]
    assert series["actor/entropy"].values.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[1, 2]",
        "{}",
        '{"step": null}',
        '{"step": "3"}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1e999}',
        '{"step": 99999999999999999999999}',
        "[" * 100_000,
        "\x00\x00",
        '{"step": 2, "actor/entropy": "high", "actor/grad_norm": [1], "bitwise/max_ulp": {"a": 1}}',
        '{"step": 2, "actor/entropy": NaN, "actor/grad_norm": -Infinity, "critic/score/mean": 1e400}',
        '{"step": 2, "actor/entropy": 1' + "0" * 400 + ', "time": 1e300}',
        '{"step": 2, "actor/entropy": 1e308, "actor/grad_norm": -1e308, "time": null}',
    ],
)
def test_any_line_is_read_or_left_out(tmp_path, line):
    run = write_run(tmp_path / "run", [row(1), row(3)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    data = data_of(run)
    traces = [trace for figure in data["figures"] for trace in figure["data"]]
    steps = {step for trace in traces for step in trace["x"]}
    assert {1, 3} <= steps <= {1, 2, 3}


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe\x00", b"[1", b"- a\n- b", b"!!python/object:os.system {}", b"7"]
)
def test_files_beside_the_metrics_may_be_missing_or_broken(tmp_path, content):
    run = write_run(tmp_path / "run")
    for name in ("config.yaml", "certificate.json", "environment.json"):
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(content)
    assert len(data_of(run)["figures"]) > 10
    if content is None:
        assert read_run(run).problems == tuple(
            f"there is no {name}" for name in ("config.yaml", "certificate.json", "environment.json")
        )


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "7",
        '{"response": 7}',
        '{"response": null, "score": 1}',
        '{"response": "ab", "token_lengths": [1], "logprobs": [-1]}',
        '{"response": "ab", "token_lengths": [3, -1], "logprobs": [-1, -1]}',
        '{"response": "ab", "token_lengths": "x", "logprobs": {}}',
        '{"response": "ab", "token_lengths": [1, 1], "logprobs": ["a", NaN], "score": NaN, "extra": {"a": "b"}}',
        '{"response": "\\ud800", "prompt": {"a": 1}, "ground_truth": [1], "score": "<b>", "row": [1], "extra": 3}',
    ],
)
def test_any_line_of_samples_is_read_or_left_out(tmp_path, line):
    run = write_run(tmp_path / "run")
    (run / "samples" / "step_2.jsonl").write_text(line + "\n" + (run / "samples" / "step_4.jsonl").read_text())
    (run / "samples" / "notes.txt").write_text("mine")
    (run / "samples" / "step_1.jsonl").mkdir()
    shown = data_of(run)["samples"][0]["shown"]
    assert [one["step"] for one in shown] == [2, 4]
    assert shown[0]["samples"][-1]["response"] == "4 two"
    for sample in shown[0]["samples"][:-1]:
        assert sum(length for length, _ in sample.get("tokens", [])) in (0, len(sample["response"]))


def test_long_texts_are_cut_with_their_tokens(tmp_path):
    run = write_run(tmp_path / "run", response="4" + "x" * 20_000)
    (sample,) = data_of(run)["samples"][0]["shown"][0]["samples"]
    assert len(sample["response"]) == 8000
    assert sum(length for length, _ in sample["tokens"]) <= 8000
    assert sample["cut"] == {"response": 12_001}


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    run = write_run(tmp_path / "runs" / "one")
    cases = {
        "missing": "does not exist",
        "file": "is a file",
        "empty": "is not a run directory: it has neither metrics.jsonl nor config.yaml",
        "runs": f"did you mean {run}?",
    }
    for name, message in cases.items():
        with pytest.raises(NoRunError, match=r"directory of a run|run directory"):
            read_run(tmp_path / name)
        assert main(["report", str(run), str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / FILE_NAME).exists()


def test_a_place_that_takes_no_file_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "r.html")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_a_page_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    out = write_report([read_run(write_run(tmp_path / "run"))], tmp_path / "report.html")
    before = out.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    monkeypatch.setattr(type(out), "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([read_run(tmp_path / "run")], out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_nothing_common_between_runs_is_needed(tmp_path):
    first = write_run(tmp_path / "a", [{"step": 1, "critic/score/mean": 1.0}])
    second = write_run(tmp_path / "b", [{"step": 1_000_000, "actor/entropy": 1.0}], seed=1)
    (second / "config.yaml").write_text(yaml.safe_dump({"trainer": {"seed": [1, {"a": None}], 3: 4}}))
    assert len(data_of(first, second)["figures"]) == 2


def test_a_null_is_named(tmp_path):
    run = write_run(tmp_path / "run", [row(1), row(2) | {"actor/grad_norm": None}])
    assert "actor/grad_norm is not finite in 1 of 2 steps" in read_run(run).problems


def test_samples_without_token_data_are_shown_plain(tmp_path):
    run = write_run(tmp_path / "run")
    write_samples(run, 4, [group("4 two")])
    assert "tokens" not in data_of(run)["samples"][0]["shown"][0]["samples"][0]
    assert json.dumps("4 two") in render([read_run(run)])
