"""Traces of chosen steps: where they are written, what is in them, and what is refused."""

from __future__ import annotations

import gzip
import json

import pytest
from run_results import digest

from vexact.config import ConfigError, load_config
from vexact.trainer.launch import run
from vexact.trainer.step.profile import StageProfiler


def traces(directory):
    return sorted(file.name for file in directory.iterdir())


def test_chosen_steps_are_traced_and_nothing_else_changes(overrides, metrics, tiny, tmp_path):
    more = (f"data.val_files={tiny / 'test.jsonl'}", "trainer.test_freq=1")
    assert run(load_config(overrides("trainer.profile_steps=[1,3]", *more))) == 0
    traced, directory = digest(tmp_path / "run", 3), tmp_path / "run" / "profile"
    names = [f"step_{step}_{stage}_rank0.json.gz" for step in (1, 3) for stage in ("rollout", "update")]
    assert traces(directory) == names
    assert [row["bitwise/tokens_different"] for row in metrics() if row["step"]] == [0, 0, 0]
    for name, operator in zip(names[:2], ("aten::", "Backward")):
        events = json.loads(gzip.decompress((directory / name).read_bytes()))["traceEvents"]
        assert any(operator in event["name"] and event["ph"] == "X" for event in events), name
    assert run(load_config(overrides("trainer.resume_mode=disable", *more))) == 0
    assert digest(tmp_path / "run", 3) == traced
    assert (traces(tmp_path / "run" / "profile.1"), traces(directory)) == (names, [])


def test_every_batch_of_a_search_for_groups_has_its_trace(overrides, tmp_path):
    profiler = StageProfiler(tmp_path, steps=(2,), rank=1)
    for name in ("step2-0-row1", "step2-4-row2/0", "step1-0-row1", "step22-0-row2", "val-0", ""):
        with profiler("rollout", name):
            pass
    assert traces(tmp_path / "profile") == ["step_2_rollout_rank1.json.gz", "step_2_rollout_rank1_2.json.gz"]


def test_a_stage_that_fails_leaves_no_trace_and_its_error(tmp_path):
    with pytest.raises(KeyError, match="gone"), StageProfiler(tmp_path, steps=(2,))("rollout", "step2-0"):
        raise KeyError("gone")
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_costs_a_line_and_not_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    with StageProfiler(tmp_path, steps=(2,))("rollout", "step2-0"):
        pass
    assert "step_2_rollout_rank0.json.gz is lost: File exists" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["trainer.profile_steps=[2,4]"],
            r"trainer.profile_steps=\[2, 4\]: there is no 4; this run's steps are 1 to 3",
        ),
        (["trainer.profile_steps=[0]"], "trainer.profile_steps.*>= 1"),
        (["trainer.profile_steps=[x]"], "trainer.profile_steps"),
        (["trainer.profile_steps=[1]", "trainer.profile_ranks=[0,1]"], "there is no 1; this run's only rank is 0"),
        (["trainer.profile_steps=[1]", "trainer.profile_ranks=[]"], r"ranks=\[\] would write nothing; name a rank"),
        (["global_profiler.steps=[9]"], "trainer.profile_steps=.*there is no 9"),
        (["global_profiler.tool=nsys"], "traces are torch.profiler's"),
    ],
)
def test_what_there_is_not_is_not_traced(overrides, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(load_config(overrides(*settings)))
    assert not (tmp_path / "run").exists()


def test_null_as_in_the_defaults_of_verl_traces_nothing(overrides):
    for key in ("trainer.profile_steps", "global_profiler.steps", "global_profiler.tool"):
        assert not load_config(overrides(f"{key}=null")).trainer.profile_steps
