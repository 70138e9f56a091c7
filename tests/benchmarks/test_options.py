"""What a script cannot do is said before it begins."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import host_cost
from benchmarks.rollout import async_scheduling, rescore, serving, throughput
from benchmarks.shared import options

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def told(capsys: pytest.CaptureFixture[str], *given: str, main=throughput.main) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(given))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_no_script_measures_first_and_finds_out_then_that_its_file_cannot_be_written() -> None:
    found = [line for file in SCRIPTS.rglob("*.py") for line in re.findall(r'add\w*\("--out".*', file.read_text())]
    assert len(found) > 20
    assert [line for line in found if "type=out_file" not in line and "SUPPRESS" not in line] == []


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (throughput.main, rescore.main, serving.main):
        assert "is a directory; name a file in it" in told(capsys, "--out", str(tmp_path), main=main)
        assert f"there is no directory {tmp_path / 'no'}; make it first" in told(
            capsys, "--out", str(tmp_path / "no" / "a.json"), main=main
        )
    assert options.out_file(str(tmp_path / "a.json")) == tmp_path / "a.json"


@pytest.mark.parametrize(
    ("main", "given", "expected"),
    [
        (throughput.main, ["--sequences", "1", "0"], "argument --sequences: 0 must be at least 1"),
        (throughput.main, ["--new_tokens", "-3"], "argument --new_tokens: -3 must be at least 1"),
        (throughput.main, ["--repeats", "2.5"], "argument --repeats: 2.5 is no whole number"),
        (throughput.main, ["--model", "nowhere"], "nowhere is no checkpoint: there is no nowhere/config.json"),
        (rescore.main, ["--tokens", "0"], "argument --tokens: 0 must be at least 1"),
        (serving.main, ["--rates", "0"], "argument --rates: 0 must be more than 0"),
        (serving.main, ["--rates", "nan"], "argument --rates: nan must be more than 0"),
        (serving.main, ["--memory", "1.5"], "argument --memory: 1.5 must be more than 0 and at most 1"),
        (serving.main, ["--requests", "0"], "argument --requests: 0 must be at least 1"),
        (serving.main, ["--vllm_python", "/no/python"], "/no/python is no program that can be run"),
        (serving.main, ["--shape", "huge"], "--shape huge is not known; use one of "),
        (serving.main, ["--model_path", "nowhere"], "nowhere is no checkpoint"),
    ],
)
def test_a_number_that_is_none(main, given: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in told(capsys, *given, main=main)


def test_a_script_for_gpus_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["host_cost.py"])
    assert "torch sees no GPU here" in told(capsys, main=lambda _: host_cost.main())
    monkeypatch.setattr("sys.argv", ["async_scheduling.py", "--sequences", "0"])
    assert "0 must be at least 1" in told(capsys, main=lambda _: async_scheduling.main())


def test_what_the_types_let_through() -> None:
    assert (options.at_least_one("1"), options.none_or_more("0")) == (1, 0)
    assert (options.per_second("inf"), options.part("1")) == (math.inf, 1.0)
    for text in ("", "x", "-0.1", "inf"):
        with pytest.raises(argparse.ArgumentTypeError):
            options.part(text)
