"""A run directory's second life: set aside, resumed, refused, finished, moved."""

import errno
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_runs import rewrite
from small_run import small_run

from vexact.config import load_config
from vexact.report.html import read_run
from vexact.report.sinks.jsonl import read_metrics
from vexact.trainer import driver as driver_module
from vexact.trainer.checkpoint import CheckpointError, load_checkpoint
from vexact.trainer.launch import run
from vexact.trainer.resume import ResumeError
from vexact.trainer.run import directory
from vexact.trainer.run.directory import RunDirectoryError
from vexact.trainer.run.lock import RunLockedError, run_lock

KEEP = ("trainer.save_freq=1", "trainer.keep_last=null")
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture(scope="session")
def four_steps(tiny, tmp_path_factory):
    """A finished run of four steps, all kept."""
    root = tmp_path_factory.mktemp("four")
    assert run(load_config(_overrides(tiny, root / "run", *KEEP, "trainer.total_training_steps=4"))) == 0
    return root / "run"


def _overrides(tiny, run_dir, *more):
    return [*small_run(tiny, run_dir), "trainer.logger=[jsonl]", *more]


@pytest.fixture
def used(four_steps, tiny, tmp_path, caplog):
    """(its directory, a function that starts a run in it and returns what it said)."""
    directory = shutil.copytree(four_steps, tmp_path / "run")
    caplog.set_level(logging.INFO, logger="vexact")

    def start(*more):
        caplog.clear()
        assert run(load_config(_overrides(tiny, directory, *KEEP, *more))) == 0
        return caplog.text

    return directory, start


def _steps(directory):
    return sorted(path.name for path in directory.iterdir())


def _weights(checkpoint):
    return load_checkpoint(checkpoint)[1]["parameters"]


def _equal(a, b):
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in ("weight", "exp_avg", "exp_avg_sq"))


def test_starting_anew_sets_the_earlier_run_aside(used):
    directory, start = used
    (directory / "report.html").write_text("of the earlier run")
    text = start("trainer.resume_mode=disable", "trainer.total_training_steps=2", "trainer.keep_last=2")
    aside = "set aside what this run does not go on from: checkpoints.1 (step_1 to step_4), samples.1, metrics.1.jsonl"
    assert f"{aside}, starts.1.jsonl, report.1.html in {directory}" in text
    assert (directory / "report.1.html").read_text() == "of the earlier run"
    assert _steps(directory / "checkpoints") == ["step_1", "step_2"]
    assert _steps(directory / "checkpoints.1") == ["step_1", "step_2", "step_3", "step_4"]
    assert (directory / "latest").read_text() == "checkpoints/step_2\n"
    assert [row["step"] for row in read_metrics(directory / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in read_metrics(directory / "metrics.1.jsonl")] == [1, 2, 3, 4]
    assert _equal(_weights(directory / "checkpoints" / "step_2"), _weights(directory / "checkpoints.1" / "step_2"))
    assert "resuming after step 2" in start("trainer.total_training_steps=3")
    assert "checkpoints.2 (step_1 to step_3)" in start("trainer.resume_mode=disable", "trainer.total_training_steps=1")


def test_rewinding_sets_later_checkpoints_aside_and_auto_follows(used):
    directory, start = used
    back = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={directory}/checkpoints/step_2")
    text = start(*back, "trainer.total_training_steps=3", "trainer.keep_last=2")
    assert "checkpoints.1 (step_3 to step_4), samples.1, metrics.1.jsonl" in text
    assert _steps(directory / "checkpoints") == ["step_2", "step_3"]
    assert (directory / "latest").read_text() == "checkpoints/step_3\n"
    assert _steps(directory / "samples.1") == ["step_3.jsonl", "step_4.jsonl"]
    assert [row["step"] for row in read_metrics(directory / "metrics.jsonl")] == [1, 2, 3]
    assert len(read_metrics(directory / "metrics.1.jsonl")) == 4
    text = start("trainer.total_training_steps=4")
    assert "resuming after step 3" in text
    assert "set aside" not in text
    assert _equal(_weights(directory / "checkpoints" / "step_4"), _weights(directory / "checkpoints.1" / "step_4"))


def test_what_stopped_an_earlier_start_is_not_told_of_the_next(used):
    directory, start = used
    (directory / "divergence.txt").write_text("first divergence")
    (directory / "divergence.pt").write_text("replay")
    assert "set aside what this run does not go on from: divergence.1.txt, divergence.1.pt" in start(
        "trainer.total_training_steps=5"
    )
    assert (directory / "divergence.1.pt").read_text() == "replay"
    assert not (directory / "divergence.txt").exists()


def test_going_on_from_another_directory(used, four_steps):
    directory, start = used
    text = start(
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={four_steps}/checkpoints/step_2",
        "trainer.total_training_steps=3",
    )
    assert "checkpoints.1 (step_1 to step_4)" in text
    assert _steps(directory / "checkpoints") == ["step_3"]


def test_what_a_killed_rewind_left_is_set_aside_by_the_next_start(used):
    directory, start = used
    (directory / "latest").write_text("checkpoints/step_3\n")
    text = start("trainer.total_training_steps=4")
    assert "resuming after step 3" in text
    assert "checkpoints.1 (step_4)" in text
    assert _equal(_weights(directory / "checkpoints" / "step_4"), _weights(directory / "checkpoints.1" / "step_4"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["trainer.seed=43"], ["trainer.seed=43 (was 42)", f"{ROLLOUT}.seed=43 (was 42)", "data.seed=43 (was 42)"]),
        (["data.train_batch_size=8", f"{ROLLOUT}.n=2"], ["data.train_batch_size=8 (was 4)", f"{ROLLOUT}.n=2 (was 4)"]),
        (["actor_rollout_ref.actor.optim.lr=1e-4"], ["actor_rollout_ref.actor.optim.lr=0.0001 (was 0.001)"]),
        (["actor_rollout_ref.actor.optim.lr_scheduler_type=cosine"], ["lr_scheduler_type=cosine (was constant)"]),
        (["actor_rollout_ref.actor.ppo_mini_batch_size=2"], ["ppo_mini_batch_size=2 (was 4)"]),
        (["actor_rollout_ref.actor.clip_ratio=0.3"], ["clip_ratio_low=0.3 (was 0.2)", "clip_ratio_high=0.3"]),
        ([f"{ROLLOUT}.dtype=bfloat16", "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16"], ["dtype=bfloat16 (was"]),
        (["data.train_max_samples=20"], ["training rows: 20 (were 40) [data.train_max_samples=20 (was -1)]"]),
        (["data.max_prompt_length=3", "data.truncation=left"], ["same rows have other token ids [data.max_prompt_l"]),
        (["actor_rollout_ref.model.custom_chat_template=\"{{ messages[0]['content'] }}\""], ["the chat template chan"]),
        (["reward.custom_reward_function.path=null"], ["reward: its file", "the function changed"]),
    ],
)
def test_a_change_that_matters_is_named_and_refused(used, more, named):
    directory, start = used
    before = sorted(directory.rglob("*"))
    with pytest.raises(ResumeError) as caught:
        start("trainer.total_training_steps=5", *more)
    for part in [*named, "step_4 is of a run that differs", "trainer.resume_changed=allow"]:
        assert part in str(caught.value)
    assert sorted(directory.rglob("*")) == before


def _shuffled(root):
    lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
    (root / "train.jsonl").write_text("".join(reversed(lines)))


def _other_answer(root):
    text = (root / "train.jsonl").read_text()
    (root / "train.jsonl").write_text(text.replace('"ground_truth": "', '"ground_truth": "1'))


def _other_rope(root):
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "model" / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0}))


def _other_weights(root):
    from safetensors.torch import load_file, save_file

    tensors = load_file(root / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, root / "model" / "model.safetensors", {"format": "pt"})


def _other_reward(root):
    (root / "reward.py").write_text((root / "reward.py").read_text().replace("13579", "02468"))


def _other_vocabulary(root):
    text = (root / "model" / "tokenizer.json").read_text()
    tokens = json.loads(text)
    vocabulary = tokens["model"]["vocab"]
    a, b = "12"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (root / "model" / "tokenizer.json").write_text(json.dumps(tokens))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_shuffled, "training rows: in another order; changed on disk: "),
        (_other_answer, "training rows: as many, with other content; changed on disk: "),
        (_other_rope, "model: config.json rope_theta=500000.0 (was absent)"),
        (_other_weights, "model: the weights that training began from are others"),
        (_other_reward, "reward: its file changed"),
        (_other_vocabulary, "tokenizer: the vocabulary, its files changed"),
    ],
)
def test_a_file_that_changed_under_the_run_is_named(tiny, used, tmp_path, change, named):
    """The same paths, other contents: nothing in the configuration shows it."""
    directory, start = used
    copy = shutil.copytree(tiny, tmp_path / "copy")
    inputs = _overrides(copy, directory)[:3]
    start(*inputs, "trainer.total_training_steps=5")
    change(copy)
    with pytest.raises(ResumeError) as caught:
        start(*inputs, "trainer.total_training_steps=6")
    assert named in str(caught.value)


def test_what_changes_no_bit_is_free_and_the_rest_can_be_allowed(tiny, used, tmp_path):
    directory, start = used
    inputs = _overrides(shutil.copytree(tiny, tmp_path / "moved"), directory)[:3]
    text = start(
        *inputs,
        "trainer.total_training_steps=5",
        "trainer.save_freq=2",
        "trainer.keep_last=1",
        "trainer.logger=[console,jsonl]",
        f"data.val_files={tiny / 'test.jsonl'}",
        f"{ROLLOUT}.max_num_seqs=3",
        f"{ROLLOUT}.page_size=8",
        "actor_rollout_ref.actor.clip_ratio_low=0.2",
        "actor_rollout_ref.actor.kl_loss_coef=0.5",
        "reward.timeout_s=20",
    )
    assert "resuming after step 4" in text
    assert _steps(directory / "checkpoints") == ["step_5"]
    text = start("trainer.total_training_steps=6", "trainer.seed=43", "trainer.resume_changed=allow")
    assert "trainer.seed=43 (was 42)" in text
    assert "resuming after step 5" in text
    start("trainer.total_training_steps=7", "trainer.seed=43")  # the run now is the changed one
    assert read_run(directory).changed["trainer.seed"] == "42 to step 5, 43 from step 6 on"


def test_a_finished_run_says_so_and_loads_no_model(used, monkeypatch):
    directory, start = used
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    monkeypatch.setattr("vexact.trainer.launch.build_workers", None)
    for steps in (4, 2):
        text = start(f"trainer.total_training_steps={steps}")
        assert f"nothing is left to do: step 4 of {steps} is saved in {directory}/checkpoints/step_4" in text
        assert len(text.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before


def test_a_moved_run_and_linked_checkpoints_go_on(used, tiny, tmp_path):
    directory, start = used
    shutil.move(directory / "checkpoints", tmp_path / "elsewhere")
    (directory / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert "resuming after step 4" in start("trainer.total_training_steps=5")
    moved = directory.rename(tmp_path / "moved")
    assert run(load_config(_overrides(tiny, moved, *KEEP, "trainer.total_training_steps=6"))) == 0
    assert _steps(tmp_path / "elsewhere") == [f"step_{step}" for step in range(1, 7)]
    anew = (*KEEP, "trainer.total_training_steps=1", "trainer.resume_mode=disable")
    assert run(load_config(_overrides(tiny, moved, *anew))) == 0
    assert _steps(tmp_path / "elsewhere") == ["step_1"]  # the new ones are where the link points, too
    assert len(_steps(tmp_path / "elsewhere.1")) == 6


def test_a_damaged_latest_stops_the_start_and_names_a_whole_one(used, monkeypatch):
    directory, start = used
    monkeypatch.setattr("vexact.trainer.launch.build_workers", None)
    file = directory / "checkpoints" / "step_4" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(CheckpointError, match=rf"{file} is not what was saved.*step_3 is whole.*=resume_path"):
        start("trainer.total_training_steps=5")
    shutil.rmtree(directory / "checkpoints" / "step_4")
    (directory / "checkpoints" / "step_4").mkdir()
    with pytest.raises(CheckpointError, match=r"step_4 is not a checkpoint \(no trainer_state\); step_3 is whole"):
        start("trainer.total_training_steps=5")


def test_a_checkpoint_of_another_name_or_model_is_refused(used, tiny, tmp_path):
    directory, start = used
    shutil.copytree(directory / "checkpoints" / "step_2", directory / "checkpoints" / "step_6")
    (directory / "latest").write_text("checkpoints/step_6\n")
    with pytest.raises(CheckpointError, match="step_6 holds step 2: it was renamed or copied in"):
        start("trainer.total_training_steps=7")


def test_a_run_of_an_earlier_version_goes_on(used):
    """No manifest, no identity, no format in the state."""
    directory, start = used
    path = directory / "checkpoints" / "step_4"
    saved = rewrite(path, 1)
    text = start("trainer.total_training_steps=5", "trainer.seed=43")
    assert "written by an earlier version: it has no digests" in text
    assert "resuming after step 4" in text
    first = saved["actor"]["parameters"]["norm.weight"]
    del first["exp_avg_sq"]
    torch.save(saved, path / "trainer_state.pt")
    (directory / "latest").write_text("checkpoints/step_4\n")
    with pytest.raises(CheckpointError, match=r"step_4: the state of norm\.weight has other .*: missing exp_avg_sq"):
        start("trainer.total_training_steps=5")


def test_a_validation_moves_nothing(used, tiny):
    directory, start = used
    validate = ("trainer.val_only=true", f"data.val_files={tiny / 'test.jsonl'}")
    settings = (directory / "config.yaml").read_text()
    text = start(*validate, "trainer.seed=7")
    assert text.count("although this run differs") == 1
    assert "resuming" not in text
    assert (directory / "config.yaml").read_text() == settings
    with pytest.raises(RunDirectoryError, match=r"val_only=true with trainer\.resume_mode=disable validates other"):
        start(*validate, "trainer.resume_mode=disable")
    assert len(_steps(directory / "checkpoints")) == 4


def test_a_second_run_is_kept_out(used):
    directory, start = used
    with run_lock(directory), pytest.raises(RunLockedError, match="in use by another run"):
        start("trainer.total_training_steps=5")


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/samples"])
def test_a_file_in_the_place_of_a_directory_is_found_first(overrides, tmp_path, monkeypatch, where):
    monkeypatch.setattr("vexact.trainer.launch.load_inputs", None)
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("mine")
    with pytest.raises(
        (RunDirectoryError, ValueError), match=r"the run directory .*/run cannot be .*default_local_dir"
    ):
        run(load_config(overrides()))
    assert (tmp_path / where).read_text() == "mine"


@pytest.mark.parametrize("free", [0, 100_000])
def test_a_full_disk_is_found_first(overrides, tmp_path, monkeypatch, free):
    monkeypatch.setattr("vexact.trainer.launch.load_inputs", None)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free})())
    with pytest.raises(RunDirectoryError, match=r"its disk is too full: a checkpoint needs \d+ MiB and 0 MiB are free"):
        run(load_config(overrides()))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_refuses_writes_is_found_first(overrides, tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("vexact.trainer.launch.load_inputs", None)
    monkeypatch.setattr(directory, "_write_once", refuse)
    with pytest.raises(RunDirectoryError, match=r"cannot be used: Permission denied \(.*\.write-test\)"):
        run(load_config(overrides()))


def test_the_last_weights_are_saved_whatever_validation_does(overrides, tiny, metrics, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="vexact")
    more = (f"data.val_files={tiny / 'test.jsonl'}", "trainer.val_before_train=false")
    assert run(load_config(overrides(*more, f"trainer.default_local_dir={tmp_path / 'whole'}"))) == 0

    def fail(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(driver_module, "evaluate", fail)
        with pytest.raises(ZeroDivisionError):
            run(load_config(overrides(*more)))
    saved = tmp_path / "run" / "checkpoints" / "step_3"
    assert _equal(_weights(saved), _weights(tmp_path / "whole" / "checkpoints" / "step_3"))
    assert [row["step"] for row in metrics()] == [1, 2]

    assert run(load_config(overrides(*more))) == 0  # repeats the validation and reports the step
    assert "step 3 is trained and saved; its validation is repeated" in caplog.text
    ours, theirs = metrics("run")[-1], metrics("whole")[-1]
    assert ours["step"] == 3
    clock = ("time", "timing_s", "perf", "reward/time_s", "rollout/decode", "rollout/host", "rollout/wait")
    assert {k: v for k, v in ours.items() if not k.startswith(clock)} == {
        k: v for k, v in theirs.items() if not k.startswith(clock)
    }
    caplog.clear()
    assert run(load_config(overrides(*more))) == 0
    assert "nothing is left to do" in caplog.text
    assert len(metrics()) == 3


def test_ten_flipped_bits_are_named(four_steps):
    script = Path(__file__).parents[3] / "benchmarks" / "faults" / "bit_flips.py"
    step = four_steps / "checkpoints" / "step_4"
    command = [sys.executable, str(script), "--checkpoint", str(step), "--flips", "10", "--seed", "5"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "read back: 10 flips, 10 named, 0 not named, 0 unnoticed" in ended.stdout
