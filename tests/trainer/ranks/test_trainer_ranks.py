"""A run on several processes is the run on one: the same samples, the same weights and moments, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_runs
from processes import PATIENCE_S
from run_results import digest, rows, samples
from small_run import small_run

from vexact.config import load_config
from vexact.trainer.launch import run

STEPS = 4
COMMON = (
    f"trainer.total_training_steps={STEPS}",
    "trainer.samples_per_step=-1",
    "trainer.save_freq=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40",
    "actor_rollout_ref.actor.use_kl_loss=true",
)


def torchrun(processes: int, arguments: list[str], *, check: bool = True, **variables: str) -> str:
    """`vexact train` under torchrun; its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", "vexact", "train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory):
    """The run that all others must equal."""
    directory = tmp_path_factory.mktemp("one") / "run"
    assert run(load_config(arguments(tiny, directory))) == 0
    return directory


def arguments(tiny: Path, directory: Path, *more: str) -> list[str]:
    return [
        *small_run(tiny, directory),
        "trainer.logger=[jsonl]",
        *COMMON,
        *more,
    ]


def assert_same_run(directory: Path, one_process: Path) -> None:
    assert samples(directory, STEPS) == samples(one_process, STEPS)
    for row, expected in zip(rows(directory), rows(one_process), strict=True):
        assert row["bitwise/tokens_different"] == row["training/rollout_probs_diff_max"] == 0
        for key in ("bitwise/tokens_compared", "critic/score/mean", "response_length/mean", "rollout/num_tokens"):
            assert row[key] == expected[key], key
        assert row["actor/grad_norm"] == expected["actor/grad_norm"]
    assert digest(directory, STEPS) == digest(one_process, STEPS)


APART = ("trainer.rollout_gpus=1", "trainer.profile_steps=[2]", "trainer.profile_ranks=[0,2]")
TRACES = ["step_2_rollout_rank2.json.gz", "step_2_update_rank0.json.gz"]


@pytest.mark.parametrize(("processes", "more", "traces"), [(2, (), []), (3, APART, TRACES), (4, (), [])])
def test_torchrun_gives_the_weights_of_one_process(processes, more, traces, tiny, one_process, tmp_path):
    output = torchrun(processes, arguments(tiny, tmp_path / "run", *more))
    assert_same_run(tmp_path / "run", one_process)
    assert sorted(file.name for file in (tmp_path / "run").glob("profile/*")) == traces
    assert output.count("done: steps 1 to") <= 1, output


def test_ray_gives_the_weights_of_one_process(tiny, one_process, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert run(load_config(arguments(tiny, tmp_path / "run", "trainer.n_gpus_per_node=2"))) == 0
    assert_same_run(tmp_path / "run", one_process)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ((), 0, f"nothing is left to do: step {STEPS} of {STEPS}"),
        (("--dry_run",), 0, "2 processes train and sample"),
        (("trainer.seed=x",), 2, "trainer.seed='x'"),
    ],
)
def test_a_command_without_work_for_the_other_ranks_lets_them_go(more, code, said, tiny, one_process, tmp_path):
    done = rank_runs.start(tmp_path, [*arguments(tiny, one_process), *more], ranks=2)
    assert done.wait() == [code, 0], done.output()
    assert done.output().count(said) == 1
    assert done.output(1) == ""


def test_what_all_ranks_say_is_said_once(tiny, tmp_path):
    more = (
        "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
        "actor_rollout_ref.rollout.mismatch.mode=noise",
        "actor_rollout_ref.rollout.mismatch.scale=0.001",
        "trainer.exactness=warn",
        "trainer.total_training_steps=2",
    )
    done = rank_runs.start(tmp_path / "logs", arguments(tiny, tmp_path / "run", *more), ranks=3)
    assert done.wait() == [0, 0, 0], done.output()
    assert done.output().count("loss_agg_mode=token-mean is not used") == 1, done.output()
    assert done.output().count("rollout and trainer disagree") == 1, done.output()
    assert done.output(1) == done.output(2) == ""
