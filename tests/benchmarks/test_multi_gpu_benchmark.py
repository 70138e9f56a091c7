"""What the benchmarks of several GPUs run, and what they make of it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S, until

from benchmarks.faults import lose_rank
from benchmarks.multi_gpu.layouts import Layout
from benchmarks.multi_gpu.offload import least_offload
from benchmarks.multi_gpu.steps import efficiency, problems
from benchmarks.shared.family import end_family, marked
from benchmarks.trainer import grpo_run
from vexact.config.memory import Machine
from vexact.prepare.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]


def test_layouts_by_their_names() -> None:
    assert Layout.parse("4") == Layout(4)
    assert Layout.parse("3+1") == Layout(3, 1)
    assert Layout.parse("2+2,async") == Layout(2, 2, True)
    assert Layout(3, 1).overrides == ["trainer.n_gpus_per_node=4", "trainer.rollout_gpus=1"]
    for text in ("0", "4+0", "4,async", "2+2,", "+1", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is no layout: 4 is four"):
            Layout.parse(text)


def entry(gpus: int, layout: str, step: float, weights: str = "a") -> dict:
    seconds = {"gen": step, "update_actor": step, "step": step}
    found = {"gpus": gpus, "layout": layout, "seconds": seconds, "tokens_different": 0, "tokens_compared": 9}
    return found | {"weights_sha256": weights, "moments_sha256": weights}


def test_a_run_one_step_off_may_end_with_weights_of_its_own() -> None:
    runs = {"1": entry(1, "colocated", 4.0), "2+2": entry(4, "disaggregated", 3.0)}
    assert problems(runs | {"ahead": entry(4, "one step off", 2.0, "b")}) == []
    found = problems(runs | {"4": entry(4, "colocated", 1.0, "c")})
    assert [line.split(":")[0] for line in found] == [
        f"{name}_sha256 is not the same everywhere" for name in ("weights", "moments")
    ]


def test_efficiency_is_beside_the_run_on_fewest_gpus() -> None:
    runs = {"4": entry(4, "colocated", 2.5), "2+2": entry(4, "disaggregated", 9.0), "2": entry(2, "colocated", 4.0)}
    assert efficiency(runs) == {"4": {"generation": 0.8, "update": 0.8, "step": 0.8}}
    assert efficiency({"2+2": runs["2+2"]}) == {}


def test_a_run_that_is_out_of_time_keeps_the_steps_it_finished(tmp_path, monkeypatch) -> None:
    row = {f"timing_s/{name}": 2.0 for name in ("gen", "update_actor", "step")}
    row |= {"actor/loss": 0.0, "actor/grad_norm": 1.5, "bitwise/tokens_compared": 7, "rollout/num_tokens": 7}
    row |= {"prompt_length/mean": 3.0, "response_length/mean": 4.0}
    told = tmp_path / "run" / "metrics.jsonl"
    lines = f"{json.dumps({'data/rows': 9})}\n{json.dumps(row)}\n{json.dumps(row)}\n{json.dumps(row)[:20]}"
    script = f"import pathlib, time; pathlib.Path({str(told)!r}).write_text({lines!r}); time.sleep({PATIENCE_S})"
    monkeypatch.setattr(grpo_run, "command", lambda *given: [sys.executable, "-c", script])

    def until_told(process, rows, deadline, stop_after) -> int | str:
        until(lambda: told.is_file() and told.read_text() == lines)
        return wait(process, rows, 0.0, stop_after)

    wait = grpo_run.wait
    monkeypatch.setattr(grpo_run, "wait", until_told)
    with pytest.raises(grpo_run.OutOfTime, match="the time was up after step 2") as stopped:
        grpo_run.train(1, "torchrun", [], tmp_path / "run", 1.0)
    figures = grpo_run.figures(stopped.value.run)
    assert (figures["steps"], figures["tokens_compared"], figures["step_s"]) == (2, 14, [2.0, 2.0])
    run = entry(4, "colocated", 1.0) | {"unfinished": str(stopped.value)}
    assert problems({"4": run}) == ["4: the time was up after step 2"]
    assert efficiency({"4": run, "2": entry(2, "colocated", 4.0)}) == {}

    lines = ""  # before its first step there is nothing to keep
    told.unlink()
    script = f"import pathlib, time; pathlib.Path({str(told)!r}).touch(); time.sleep({PATIENCE_S})"
    with pytest.raises(RuntimeError, match="exit code none before the time was up") as failed:
        grpo_run.train(1, "torchrun", [], tmp_path / "run", 1.0)
    assert not isinstance(failed.value, grpo_run.OutOfTime)


@pytest.mark.parametrize(
    ("layout", "offloaded"),
    [("4", ""), ("3+1", ""), ("2+2", "moments"), ("2", "moments"), ("1", "moments, sleeps")],
)
def test_no_more_is_offloaded_than_the_plan_needs(layout: str, offloaded: str, tmp_path: Path) -> None:
    """Of 8 B parameters, on GPUs of 79 GiB; what cannot fit at all is left to the run to refuse."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-8b"]))
    shape = grpo_run.SHAPES["qwen3-8b"]
    run = Layout.parse(layout)
    overrides = [
        f"actor_rollout_ref.model.path={tmp_path}",
        f"data.max_prompt_length={shape.prompt_tokens}",
        f"data.max_response_length={shape.new_tokens}",
        f"{grpo_run.ACTOR}.ppo_max_token_len_per_gpu={shape.token_budget}",
        *run.overrides,
    ]
    found = least_offload(overrides, Machine("cuda", run.gpus, 78 << 30))
    assert [key.rpartition(".")[2] for key in found] == [
        f"optimizer_offload={str('moments' in offloaded).lower()}",
        f"param_offload={str('weights' in offloaded).lower()}",
        *(["enable_sleep_mode=true"] if "sleeps" in offloaded else []),
    ]
    assert least_offload(overrides, Machine("cpu", run.gpus)) == []


def test_all_layers_of_the_30b_on_four_gpus_sleep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-30b-a3b"]))
    overrides = [
        f"actor_rollout_ref.model.path={tmp_path}",
        "data.max_prompt_length=128",
        "data.max_response_length=576",
        f"{grpo_run.ACTOR}.ppo_max_token_len_per_gpu=2048",
        f"{grpo_run.ACTOR}.fsdp_config.expert_parallel_size=4",
    ]
    found = least_offload(overrides, Machine("cuda", 4, 78 << 30))
    assert [key.rpartition(".")[2] for key in found] == [
        "optimizer_offload=true",
        "param_offload=true",
        "enable_sleep_mode=true",
    ]


def test_the_first_visible_gpus_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert grpo_run.visible_gpus(1) == ["2"]
    with pytest.raises(ValueError, match="3 GPUs are wanted and 2 are visible"):
        grpo_run.visible_gpus(3)


def test_a_family_is_ended_to_its_last_member() -> None:
    """One that a session of its own hides from signals to the group, too."""
    nested = "import subprocess, time; subprocess.Popen(['sleep', '999'], start_new_session=True); time.sleep(999)"
    process = subprocess.Popen([sys.executable, "-c", nested], env=os.environ | {"FAMILY_TEST": "1"})
    assert until(lambda: len(marked("FAMILY_TEST", "1")) == 2)
    end_family(process)
    assert until(lambda: marked("FAMILY_TEST", "1") == [])


def test_a_rank_knows_the_step_of_every_call() -> None:
    assert lose_rank.step_of("sync", (3, False)) == lose_rank.step_of("save_shard", (3, Path(), False)) == 3
    assert lose_rank.step_of("generate", ([], [], ["step3-0-row7"])) == 3
    assert lose_rank.step_of("generate", ([], [], ["certificate/0"])) is None


def test_a_lost_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.faults.stages", "--run", "2+1", "--resume_on", "1", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    stages = ["--stages", "generation", "the update", "--at_once"]
    result = subprocess.run(
        [*command, *stages], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())["stages"]
    assert [(name, stage["rank"], stage["after_step"]) for name, stage in found.items()] == [
        ("generation", 2, 2),
        ("the update", 1, 2),
    ]
    assert found["generation"]["said"].startswith("rank 2 (host ")
