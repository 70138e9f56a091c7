"""The trainer as a process: killed, interrupted, misconfigured."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from processes import PATIENCE_S


@pytest.fixture
def train(overrides, tmp_path):
    """Starts `vexact train` in a session of its own, so that what it leaves behind can be seen."""

    def start(*more: str, program: tuple[str, ...] = ("-m", "vexact")) -> subprocess.Popen:
        # without WANDB_*: a test that used W&B in this process leaves the address of its service behind
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environ = clean | {"OMP_NUM_THREADS": "1", "WANDB_DIR": str(tmp_path)}
        command = [sys.executable, *program, "train", *overrides(*more)]
        return subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    return start


def _wait_for_step(file, step, process, timeout=PATIENCE_S):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if file.exists() and any(
            json.loads(x)["step"] >= step for x in file.read_text().splitlines() if x.endswith("}")
        ):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {timeout} s")


def _group_is_empty(pgid, timeout=PATIENCE_S):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            os.killpg(pgid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_kill_9_then_resume_ends_with_the_same_weights(train, metrics, tmp_path):
    common = ("trainer.total_training_steps=6", "trainer.save_freq=2", "trainer.logger=[jsonl,wandb]")
    whole = train(*common, f"trainer.default_local_dir={tmp_path / 'whole'}")
    assert whole.wait(PATIENCE_S) == 0, whole.communicate()[0]

    killed = train(*common, "trainer.total_training_steps=6")
    _wait_for_step(tmp_path / "run" / "metrics.jsonl", random.randint(2, 5), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    run_id = [p for p in (tmp_path / "run").rglob("*") if "wandb" in p.name and p.is_file() and "id" in p.name]
    resumed = train(*common)
    output = resumed.communicate(timeout=PATIENCE_S)[0]
    assert resumed.returncode == 0, output

    final = "checkpoints/step_6/model.safetensors"
    assert _sha256(tmp_path / "run" / final) == _sha256(tmp_path / "whole" / final)
    ours, theirs = metrics("run"), metrics("whole")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 7))
    clock = ("time", "timing_s", "perf", "reward/time_s", "rollout/decode", "rollout/host", "rollout/wait")
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(clock)} == {
            k: v for k, v in b.items() if not k.startswith(clock)
        }
    assert run_id == [p for p in (tmp_path / "run").rglob("*") if "wandb" in p.name and p.is_file() and "id" in p.name]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_cleanly(train, tmp_path, sent):
    process = train("trainer.total_training_steps=100000", "trainer.save_freq=1")
    _wait_for_step(tmp_path / "run" / "metrics.jsonl", 2, process)
    process.send_signal(sent)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 130, output
    assert re.search(r"\ninterrupted; step \d+ is saved in .*run: the same command goes on from there\n", output)
    assert "Traceback" not in output
    assert _group_is_empty(process.pid)
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step_*"))  # what is made or removed has other names
    assert checkpoints
    assert all((c / "trainer_state").is_dir() and (c / "model.safetensors").is_file() for c in checkpoints)


DROPPED = """
import os, sys
from vexact.report import Reporter
from vexact.cli import main

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), {number})
        for _ in range(100):
            pass

def {method}(self, *arguments, original=Reporter.{method}):
    if getattr(arguments[0], "step", arguments[0]) == {when!r}:
        Dropped()
    return original(self, *arguments)

Reporter.{method} = {method}
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("method", "when", "saved"), [("log", 2, "step 1 is saved"), ("stage", "update_actor", "no step is saved yet")]
)
def test_an_interrupt_that_python_drops_ends_the_run_all_the_same(train, tmp_path, method, when, saved):
    program = DROPPED.format(number=int(signal.SIGTERM), method=method, when=when)
    process = train("trainer.total_training_steps=100000", "trainer.save_freq=1", program=("-c", program))
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 130, output
    assert f"\ninterrupted; {saved}" in output
    assert "Traceback" not in output
    assert _group_is_empty(process.pid)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raise RuntimeError('no grader today')", "no grader today"),
        ("return float('nan')", "nan"),
        ("import time; time.sleep(100)", "reward.timeout_s=0.3|0.3 s"),
    ],
)
def test_a_reward_that_never_works_stops_the_run_by_name(train, tmp_path, reward, message):
    (tmp_path / "bad.py").write_text(f"def compute_score(*args, **kwargs):\n    {reward}\n")
    process = train(f"reward.custom_reward_function.path={tmp_path / 'bad.py'}", "reward.timeout_s=0.3")
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 2, output
    assert any(part in output for part in message.split("|")), output
    assert _group_is_empty(process.pid)


def test_a_reward_that_sometimes_fails_costs_samples_and_is_counted(train, metrics, tmp_path):
    (tmp_path / "flaky.py").write_text(
        "import time\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    if '7' in solution_str:\n"
        "        raise KeyError('seven')\n"
        "    if '00' in solution_str:\n"
        "        time.sleep(100)\n"
        "    return {'score': len(solution_str), 'acc': float('1' in solution_str)}\n"
    )
    more = (f"reward.custom_reward_function.path={tmp_path / 'flaky.py'}", "reward.timeout_s=1.0")
    process = train(*more, "trainer.total_training_steps=2")
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, output
    assert all(0 < row["reward/error_ratio"] < 1 for row in metrics())
    assert output.count("KeyError: 'seven'") == 2  # message and traceback, once


def test_mistakes_end_with_one_message_and_no_run(train, tmp_path):
    process = train("trainer.total_training_stepz=1")
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 2
    assert "total_training_stepz" in output
    assert "total_training_steps" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
