"""The benchmark of launching ahead: its figures by hand, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rollout import async_scheduling


def test_the_time_between_steps_by_hand() -> None:
    """Three steps of 90 µs: copy in, two kernels 5 µs apart, one of which runs beside a third, a copy back."""

    def step(start: float) -> list[dict]:
        copy = {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": start, "dur": 2}
        spans = ((start + 5, 40), (start + 10, 20), (start + 50, 30))
        kernels = [{"cat": "kernel", "name": "k", "ts": at, "dur": lasts} for at, lasts in spans]
        back = {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": start + 82, "dur": 2}
        return [back, *kernels, copy, {"cat": "cpu_op", "ts": start, "dur": 90}]

    found = async_scheduling.gaps([*step(180), *step(0), *step(90)])
    assert found == {
        "step_us": pytest.approx(260 / 3, abs=0.1),
        "between_steps_us": 15.0,  # from 80 to 95
        "between_steps_share": pytest.approx(30 / 260, abs=1e-4),
        "kernels_share": pytest.approx(210 / 260, abs=1e-4),
    }


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "async.json"
    command = [
        "async_scheduling.py",
        "--shape",
        "tiny",
        "--sequences",
        "2",
        "--mixed",
        "3",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out)])
    assert async_scheduling.main() == 0
    found = json.loads(out.read_text())["rows"]
    assert list(found) == ["2", "mixed"]
    assert [found["2"][name]["async_ratio"] > 0.5 for name in async_scheduling.MODES] == [False, True]
    assert all(rows["tokens_equal"] for rows in found.values())
