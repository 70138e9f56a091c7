"""Checkpoints written beside the training: what they hold, and what becomes of one that is on its way."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import until
from saved_runs import flat

from vexact import interrupt
from vexact.config import load_config
from vexact.models import ModelConfig, load_model
from vexact.trainer.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Progress,
    Saver,
    ShardWriter,
    load_checkpoint,
    shard_writer,
)
from vexact.trainer.checkpoint import store as store_module
from vexact.trainer.launch import run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def state(tiny):
    model = load_model(tiny / "model")
    parts = {name: {"weight": p.detach()} for name, p in model.named_parameters()}
    for part in parts.values():
        part |= {"exp_avg": torch.randn_like(part["weight"]), "exp_avg_sq": torch.rand_like(part["weight"])}
        part["num_steps"] = 3.0
    return {"num_updates": 3, "parameters": parts}


@pytest.fixture
def gate(monkeypatch):
    """Holds back every file of a save until it is set."""
    gate, write = threading.Event(), shard_writer.write_tensor_file

    def wait(file, specs, values, metadata, go_on):
        while not gate.wait(0.01):
            go_on()
        return write(file, specs, values, metadata, go_on)

    monkeypatch.setattr(shard_writer, "write_tensor_file", wait)
    yield gate
    gate.set()


@pytest.fixture
def saver(state, tmp_path):
    saved = []
    store = CheckpointStore(tmp_path, 2)
    saver = Saver(store, ShardWriter(lambda: flat(state)), True, lambda path, step: saved.append(step))
    saver.saved = saved
    return saver


@pytest.fixture
def save(saver, tiny):
    config = ModelConfig.from_hf_dict(ModelConfig.from_hf_dir(tiny / "model").raw)
    return lambda step: saver.save(Progress(step, 10 * step), config, lambda path: None, {})


def poll(saver, has_come=lambda: False):
    """As at the boundaries of steps, until something has come or is raised."""
    assert until(lambda: saver.poll() or has_come())


def _names(saver):
    return sorted(path.name for path in saver.store.directory.iterdir())


def _change(state):
    for parts in state["parameters"].values():
        for part in parts.values():
            if isinstance(part, torch.Tensor):
                part += 1


def test_training_that_goes_on_changes_nothing_of_what_is_written(saver, save, state, gate):
    before = {n: {k: p.clone() for k, p in s.items() if k != "num_steps"} for n, s in state["parameters"].items()}
    with saver:
        save(1)
        assert saver.store.latest() is None
        saver.poll()
        _change(state)
        state["num_updates"] = 4
        assert saver.saved == []
        gate.set()
    assert saver.saved == [1]
    assert saver.store.latest().name == "step_1"
    progress, loaded = load_checkpoint(saver.store.latest())
    assert (progress, loaded["num_updates"]) == (Progress(1, 10), 3)
    for name, parts in before.items():
        assert all(torch.equal(part, loaded["parameters"][name][key]) for key, part in parts.items())
    exported = load_model(saver.store.latest())
    assert all(torch.equal(p, before[n]["weight"]) for n, p in exported.named_parameters())


def test_one_at_a_time_and_it_is_published_without_being_waited_for(saver, save, state):
    save(1)
    published = threading.Event()
    saver.on_saved = lambda path, step: (saver.saved.append(step), published.set())
    poll(saver, published.is_set)
    assert saver.saved == [1]
    save(2)
    _change(state)
    save(3)  # waits for the one before
    assert saver.saved == [1, 2]
    saver.finish()
    assert saver.saved == [1, 2, 3]
    assert _names(saver) == ["step_2", "step_3"]
    first, second = (load_checkpoint(saver.store.path(step))[1]["parameters"]["norm.weight"] for step in (2, 3))
    assert torch.equal(first["weight"] + 1, second["weight"])


@pytest.mark.parametrize("failing", ["writing", "publishing"])
def test_a_failure_is_told_at_the_next_step(saver, save, monkeypatch, failing):
    save(1)
    saver.finish()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "writing":
            patched.setattr(shard_writer, "write_tensor_file", full)
        else:
            patched.setattr(store_module, "save_hf", full)
        save(2)
        with pytest.raises(CheckpointError, match=r"could not write .*step_2 on .*No space left.*default_local_dir"):
            poll(saver)
    assert saver.saved == [1]
    assert _names(saver) == ["step_1"]
    assert saver.store.latest().name == "step_1"
    load_checkpoint(saver.store.latest())
    save(3)
    saver.finish()
    assert saver.saved == [1, 3]


def test_a_state_that_is_not_finite_is_refused_before_anything_is_copied(saver, save, state):
    state["parameters"]["norm.weight"]["exp_avg"][3] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"step 1 is not saved: exp_avg of norm\.weight holds 1 non-finite .*\[3\]"
    ):
        save(1)
    assert _names(saver) == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_abandons_and_an_error_finishes(saver, save, gate, end):
    """An interrupt wants the end now; after an error the step that was saved is sound."""
    gate.set()
    save(1)
    saver.finish()
    gate.clear()

    def steps():
        with saver:
            save(2)
            if end is ZeroDivisionError:
                threading.Timer(0.1, gate.set).start()
            raise end

    with pytest.raises(end):
        steps()
    kept = [1] if end is KeyboardInterrupt else [1, 2]
    assert saver.saved == kept
    assert _names(saver) == [f"step_{step}" for step in kept]
    assert saver.store.latest().name == f"step_{kept[-1]}"


def test_an_interrupt_while_publishing_abandons(saver, save, monkeypatch):
    monkeypatch.setattr(store_module, "_sync_tree", lambda path: setattr(interrupt, "_requested", True))
    try:
        with saver:
            save(1)
            with pytest.raises(KeyboardInterrupt):
                saver.finish()
    finally:
        interrupt._requested = False
    assert _names(saver) == []
    assert saver.saved == []
    assert saver.store.latest() is None


KILLED = """
import os, sys, threading
from pathlib import Path
import torch
from vexact.models import ModelConfig, load_model
from vexact.trainer.checkpoint import CheckpointStore, Progress, Saver, ShardWriter, tensor_file, store as stores

model, run_dir, moment = sys.argv[1:]
config = ModelConfig.from_hf_dir(Path(model))
state = {f"weight.{name}": p.detach() for name, p in load_model(model).named_parameters()}
state["num_updates"] = torch.tensor(1)
saver = Saver(CheckpointStore(Path(run_dir), 2), ShardWriter(lambda: state), True)
saver.save(Progress(1, 1), config, lambda path: None)
saver.finish()

def hang(*args, **kwargs):
    print("in flight", flush=True)
    threading.Event().wait()

if moment == "writing":
    tensor_file.os.fsync = hang
else:
    stores.Path.rename = hang
saver.save(Progress(2, 2), config, lambda path: None)
while True:
    saver.poll()
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_on_its_way(tiny, tmp_path, moment):
    """What a killed run leaves is removed by the next start, and the checkpoint before it is whole."""
    command = [sys.executable, "-c", KILLED, str(tiny / "model"), str(tmp_path), moment]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in flight\n"
        process.send_signal(signal.SIGKILL)
    store = CheckpointStore(tmp_path, 2)
    assert len(list(store.directory.glob(".tmp-step_2-*"))) == 1
    store.remove_leftovers()
    assert [path.name for path in store.directory.iterdir()] == ["step_1"]
    assert store.latest().name == "step_1"
    load_checkpoint(store.latest())


def test_a_run_that_saves_beside_its_steps_saves_the_same(overrides, tmp_path, metrics, caplog):
    caplog.set_level("INFO", logger="vexact")
    keep = ("trainer.save_freq=1", "trainer.keep_last=null")
    for where, in_background in (("at_once", "false"), ("beside", "true")):
        more = (f"trainer.default_local_dir={tmp_path / where}", "trainer.total_training_steps=3")
        assert (
            run(load_config(overrides(*keep, *more, f"actor_rollout_ref.actor.checkpoint.async_save={in_background}")))
            == 0
        )
    for step in (1, 2, 3):
        ours, theirs = (
            load_checkpoint(tmp_path / where / "checkpoints" / f"step_{step}") for where in ("at_once", "beside")
        )
        assert ours[0] == theirs[0]
        for name, parts in ours[1]["parameters"].items():
            other = theirs[1]["parameters"][name]
            assert all(torch.equal(torch.as_tensor(p), torch.as_tensor(other[key])) for key, p in parts.items())
        assert f"saved {tmp_path / 'beside' / 'checkpoints' / f'step_{step}'}" in caplog.text
    assert (tmp_path / "beside" / "latest").read_text() == "checkpoints/step_3\n"
