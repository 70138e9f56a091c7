"""What a run directory keeps of the settings of earlier starts."""

from __future__ import annotations

import pytest

from vexact.config import load_config
from vexact.report.starts import read_starts
from vexact.trainer.checkpoint import CheckpointStore
from vexact.trainer.run.directory import set_aside
from vexact.trainer.run.record import write_run_record


@pytest.fixture
def begin(overrides, tmp_path):
    """Writes the record of a start and returns (first step, seed) of all that the directory then knows."""

    def write(first_step, seed, earlier=None):
        write_run_record(load_config(overrides(f"trainer.seed={seed}")), {}, first_step, earlier)
        return [(start.first_step, start.config["trainer"]["seed"]) for start in read_starts(tmp_path / "run")]

    return write


def test_starts_that_made_no_step_are_forgotten(begin, tmp_path):
    assert begin(1, 1) == [(1, 1)]
    assert begin(1, 2) == [(1, 2)]
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert not text.startswith("#")
    assert begin(5, 3) == [(1, 2), (5, 3)]
    assert begin(9, 4) == [(1, 2), (5, 3), (9, 4)]
    assert begin(5, 5) == [(1, 2), (5, 5)]  # went back to step 4
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert text.startswith("# since step 5; the steps before it have theirs in starts.jsonl\n")


def test_a_directory_of_an_earlier_version_has_the_checkpoints_word(begin):
    assert begin(5, 3, {"trainer": {"seed": 1}}) == [(1, 1), (5, 3)]
    assert begin(7, 3, {"trainer": {"seed": 9}}) == [(1, 1), (5, 3), (7, 3)]  # it knows better by now


@pytest.mark.parametrize("after", [-1, 4])
def test_they_are_set_aside_with_the_steps(begin, tmp_path, after):
    begin(1, 1)
    begin(5, 2)
    directory = tmp_path / "run"
    before = (directory / "starts.jsonl").read_text()
    assert "starts.1.jsonl" in set_aside(directory, CheckpointStore(directory, None), after)
    assert (directory / "starts.1.jsonl").read_text() == before
    assert (directory / "starts.jsonl").exists() == (after == 4)
