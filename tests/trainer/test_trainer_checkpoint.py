import errno

import pytest
import torch

from vexact.models import ModelConfig, load_model
from vexact.trainer.checkpoint import CheckpointError, CheckpointStore, Progress, load_checkpoint
from vexact.trainer.checkpoint import store as store_module


@pytest.fixture
def state(tiny):
    model = load_model(tiny / "model")
    return {"num_updates": 7, "parameters": {n: {"weight": p.detach()} for n, p in model.named_parameters()}}


@pytest.fixture
def save(tiny, state, tmp_path):
    config = ModelConfig.from_hf_dir(tiny / "model")

    def run(step, keep_last=2):
        store = CheckpointStore(tmp_path, keep_last)
        return store.save(Progress(step, 10 * step), state, config, lambda path: None)

    return run


def test_round_trip_and_retention(save, state, tmp_path):
    for step in (1, 2, 10):
        save(step)
    store = CheckpointStore(tmp_path, 2)
    assert sorted(p.name for p in store.directory.iterdir()) == ["step_10", "step_2"]
    assert store.latest().name == "step_10"
    progress, loaded = load_checkpoint(store.latest())
    assert progress == Progress(10, 100)
    assert loaded["num_updates"] == 7
    for name, saved in state["parameters"].items():
        assert torch.equal(loaded["parameters"][name]["weight"], saved["weight"])
    model = load_model(store.latest())
    assert all(torch.equal(p, state["parameters"][n]["weight"]) for n, p in model.named_parameters())


@pytest.mark.parametrize("failing", ["save_hf", "_sync_tree"])
def test_a_failed_write_leaves_the_previous_checkpoint_and_nothing_half_written(save, tmp_path, monkeypatch, failing):
    save(1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, failing, full)
    with pytest.raises(
        CheckpointError, match=r"could not write .*step_2: .*No space left.* MiB free.*default_local_dir"
    ):
        save(2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    assert (tmp_path / "latest").read_text() == "checkpoints/step_1\n"


def test_a_full_disk_is_noticed_before_writing(save, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match="disk is full: a checkpoint needs"):
        save(1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed_and_never_resumed(save, tmp_path):
    save(1)
    (tmp_path / "checkpoints" / ".tmp-step_2").mkdir()
    store = CheckpointStore(tmp_path, 2)
    assert store.latest().name == "step_1"
    store.remove_leftovers()
    assert [p.name for p in store.directory.iterdir()] == ["step_1"]


def test_unreadable_checkpoints_are_named(tmp_path, save):
    with pytest.raises(CheckpointError, match=r"is not a checkpoint \(no trainer_state\.pt\).*resume_mode=disable"):
        load_checkpoint(tmp_path)
    path = save(3)
    (path / "trainer_state.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CheckpointError, match=r"trainer_state\.pt has 9 bytes, but \d+ were saved"):
        load_checkpoint(path)
