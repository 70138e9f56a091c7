"""One step off: samples are generated beside the training, compared under their own weights, and survive a break."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_configs import MOONLIGHT
from processes import PATIENCE_S
from small_run import write_model

from vexact.config import ConfigError, load_config
from vexact.config.plan import build_plan
from vexact.trainer.checkpoint import load_checkpoint
from vexact.trainer.launch import run

STEPS = 4
BIAS_RATE = "actor_rollout_ref.actor.router_bias_update_rate=0.01"
SCRIPT = Path(__file__).with_name("async_run.py")
OVERLAP = {f"gen-{t + 1}": f"wait update-{t}" for t in range(1, STEPS)}
OVERLAP |= {f"update-{t}": f"wait gen-{t + 1}" for t in range(1, STEPS)}


@pytest.fixture(scope="module")
def experts(tiny, tmp_path_factory):
    """With a model of experts and latent attention, whose routers' biases move: all that can be one step off."""
    root = tmp_path_factory.mktemp("experts")
    for file in tiny.iterdir():
        if file.is_file():
            (root / file.name).symlink_to(file)
    changes = {"vocab_size": vocabulary_of(tiny), "num_hidden_layers": 2, "initializer_range": 0.4}
    write_model(root / "model", **MOONLIGHT | changes)
    return root


def vocabulary_of(tiny: Path) -> int:
    return int(json.loads((tiny / "model" / "config.json").read_text())["vocab_size"])


def arguments(tiny: Path, directory: Path, *more: str) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={tiny / 'model'}",
        f"data.train_files={tiny / 'train.jsonl'}",
        f"data.val_files={tiny / 'test.jsonl'}",
        f"reward.custom_reward_function.path={tiny / 'reward.py'}",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        "data.train_batch_size=4",
        "actor_rollout_ref.rollout.n=3",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=odd",
        "algorithm.filter_groups.max_num_gen_batches=0",
        "reward.num_workers=1",
        f"trainer.total_training_steps={STEPS}",
        "trainer.rollout_gpus=1",
        "trainer.async_steps=1",
        "trainer.async_audit_freq=2",
        "trainer.audit_redraw_ratio=1",
        "trainer.save_freq=2",
        "trainer.test_freq=1",
        "trainer.val_before_train=false",
        "trainer.samples_per_step=-1",
        "trainer.logger=[jsonl,console]",
        f"trainer.default_local_dir={directory}",
        *more,
    ]


def torchrun(processes: int, folder: Path, plan: dict[str, str], arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of ``async_run.py`` in so many processes."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), json.dumps(plan), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.returncode, done.stdout


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def samples(run_dir: Path, step: int, stem: str = "step") -> list[dict]:
    return [json.loads(line) for line in (run_dir / "samples" / f"{stem}_{step}.jsonl").read_text().splitlines()]


def state(run_dir: Path) -> dict[str, bytes]:
    """Weights and moments of the last step."""
    _, saved = load_checkpoint(run_dir / "checkpoints" / f"step_{STEPS}")
    parts = ("weight", "exp_avg", "exp_avg_sq")
    return {f"{name} {key}": each[key].numpy().tobytes() for name, each in saved["parameters"].items() for key in parts}


@pytest.fixture(scope="module")
def unbroken(experts, tmp_path_factory):
    """Two ranks train sharded weights that wait on the host, one generates; no update ends before the next generation
    has begun, and the other way round."""
    root = tmp_path_factory.mktemp("async")
    offload = "actor_rollout_ref.actor.fsdp_config.param_offload=true"
    code, output = torchrun(3, root / "marks", OVERLAP, arguments(experts, root / "run", offload, BIAS_RATE))
    assert code == 0, output
    assert "log-probabilities compared, 0 different" in output
    assert "in 2 of 4 steps; everything" in output
    return root / "run"


def test_generation_overlaps_the_update_with_weights_one_version_old(unbroken):
    rows = metrics(unbroken)
    assert [row["rollout/staleness/max"] for row in rows] == [0, 1, 1, 1]
    assert [row["rollout/staleness/mean"] for row in rows] == [0, 1, 1, 1]
    for step in range(1, STEPS + 1):
        assert {sample["weights_version"] for sample in samples(unbroken, step)} == {max(0, step - 2)}
        assert {sample["weights_version"] for sample in samples(unbroken, step, "val")} == {step}
    assert any(len(samples(unbroken, step)) > 12 for step in range(2, STEPS + 1)), "no step needed a second batch"
    assert rows[0]["actor/ppo_kl"] == 0, "the first step is on-policy"
    assert all(row["actor/ppo_kl"] != 0 for row in rows[1:]), "the ratio is to what was sampled with"
    assert not (unbroken / "checkpoints" / f"step_{STEPS}" / "next_step").exists(), "nothing comes after the last step"
    for row in rows:
        assert ("timing_s/gen_ahead" in row) == (row["step"] > 1)
        assert row["perf/throughput"] == pytest.approx(row["perf/total_num_tokens"] / row["timing_s/step"] / 3)


def test_due_steps_are_compared_under_the_weights_that_sampled(unbroken):
    rows = metrics(unbroken)
    for row in (rows[0], rows[2]):
        assert row["bitwise/tokens_different"] == row["bitwise/tokens_redrawn_different"] == 0
        assert row["training/rollout_probs_diff_max"] == row["rollout_corr/kl"] == 0
        assert row["bitwise/tokens_redrawn"] == row["bitwise/tokens_compared"] > 0
        assert row["bitwise/routes_compared"] == row["bitwise/tokens_compared"]
        assert row["bitwise/routes_different"] == 0
    for row in (rows[1], rows[3]):
        assert not [
            key
            for key in row
            if key.startswith(("bitwise/tokens", "bitwise/routes", "rollout_corr/", "training/rollout"))
        ]


def test_a_run_that_is_interrupted_goes_on_with_the_samples_it_has(experts, unbroken, tmp_path, monkeypatch, caplog):
    """The signal comes while step 3 trains and step 4 is generated; Ray goes on."""
    directory = tmp_path / "run"
    plan = {"gen-4": "wait update-3", "update-3": "interrupt"}
    code, output = torchrun(2, tmp_path / "marks", plan, arguments(experts, directory, BIAS_RATE))
    assert code != 0
    assert "step 2 is saved" in output, output
    assert [row["step"] for row in metrics(directory)] == [1, 2]
    assert (directory / "checkpoints" / "step_2" / "next_step").is_dir()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with caplog.at_level("INFO"):
        assert run(load_config(arguments(experts, directory, BIAS_RATE, "trainer.n_gpus_per_node=2"))) == 0
    assert "holds no samples" not in caplog.text
    assert state(directory) == state(unbroken)
    for step in range(1, STEPS + 1):
        assert samples(directory, step) == samples(unbroken, step)
        assert samples(directory, step, "val") == samples(unbroken, step, "val")
    resumed, whole = metrics(directory)[2:], metrics(unbroken)[2:]
    assert [row["rollout/staleness/max"] for row in resumed] == [1, 1]
    assert "bitwise/tokens_compared" not in resumed[0], "the weights of that version went with the process"
    assert resumed[1]["bitwise/tokens_different"] == 0
    assert resumed[1]["bitwise/tokens_compared"] > 0
    assert [row["rollout/num_tokens"] for row in resumed] == [row["rollout/num_tokens"] for row in whole]


def test_other_weights_in_the_engine_are_found_before_the_step_they_would_train(tiny, tmp_path):
    directory = tmp_path / "run"
    code, output = torchrun(2, tmp_path / "marks", {"weights-1": "spoil 1e-3"}, arguments(tiny, directory))
    assert code != 0
    assert "rollout and trainer disagree" in output
    assert "compared under weights version 1, which generated the samples of step 3" in output
    assert "first divergence: generation state: the replay agrees with the trainer" in output
    assert "the engine had gone on to weights version 2 and was given these again" in output
    last = metrics(directory)[-1]
    assert last["step"] == 3
    assert last["bitwise/tokens_different"] > 0
    assert not (tmp_path / "marks" / "update-3").exists(), "the update did not begin"


def test_a_rank_that_dies_while_it_generates_ahead_ends_the_run_at_once(tiny, tmp_path):
    """And not after the update that runs beside it, which never ends."""
    plan = {"gen-3": "kill", "update-2": "hang"}
    code, output = torchrun(2, tmp_path / "marks", plan, arguments(tiny, tmp_path / "run", "trainer.save_freq=1"))
    assert code != 0
    assert "rank 1" in output, output
    assert "in generation of step 3" in output, output
    assert (tmp_path / "run" / "checkpoints" / "step_1" / "manifest.json").is_file()


def test_settings_that_contradict_each_other_are_refused(tiny, tmp_path):
    def load(*more):
        return load_config(arguments(tiny, tmp_path / "run", *more))

    for more, message in (
        (["trainer.rollout_gpus=null"], "async_steps=1 needs GPUs of its own; set trainer.rollout_gpus"),
        (["trainer.n_gpus_per_node=1"], "leaves none to train"),
        (["algorithm.recompute_old_log_prob=true"], "must their old log-probabilities"),
        (["trainer.async_steps=2"], "async_steps"),
        (["trainer.async_audit_freq=0"], "use -1 for never"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(*more)
    plan = build_plan(load("trainer.n_gpus_per_node=2"), "cpu")
    rows = dict(plan.rows)
    assert rows["updates"] == "1 optimizer step per rollout, on samples one weights version old"
    expected = "strict: in 1 step of 2, under the weights that sampled, stop at the first unequal bit"
    assert rows["exactness"] == expected
    assert any("trainer.async_steps=1: every step but the first" in note for note in plan.advice)
    with pytest.raises(ConfigError, match=r"rollout_gpus=1 of 1 process.* leaves none to train"):
        build_plan(load(), "cpu")
    never = build_plan(load("trainer.async_audit_freq=-1", "trainer.n_gpus_per_node=2"), "cpu")
    assert any("nothing compares rollout and trainer" in note for note in never.advice)
