import errno
import json
import os
import shutil

import pytest
import torch
from saved_runs import flat, rewrite

from vexact.models import ModelConfig, load_model
from vexact.trainer.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Progress,
    Saver,
    ShardWriter,
    load_checkpoint,
    manifest,
    shard_writer,
)

WEIGHTS = "trainer_state/weight-00001-of-00001.safetensors"


@pytest.fixture
def state(tiny):
    model = load_model(tiny / "model")
    return {"num_updates": 7, "parameters": {n: {"weight": p.detach()} for n, p in model.named_parameters()}}


@pytest.fixture
def save(tiny, state, tmp_path):
    config = ModelConfig.from_hf_dir(tiny / "model")

    def run(step, keep_last=2):
        store = CheckpointStore(tmp_path, keep_last)
        identity = {"settings": {"trainer.seed": 42}}
        saver = Saver(store, ShardWriter(lambda: flat(state)))
        saver.save(Progress(step, 10 * step), config, lambda path: None, identity)
        return store.path(step)

    return run


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_and_retention(save, state, tmp_path):
    for step in (1, 2, 10):
        save(step)
    store = CheckpointStore(tmp_path, 2)
    assert _names(store.directory) == ["step_10", "step_2"]
    assert store.latest().name == "step_10"
    progress, loaded = load_checkpoint(store.latest())
    assert progress == Progress(10, 100)
    assert loaded["num_updates"] == 7
    for name, saved in state["parameters"].items():
        assert torch.equal(loaded["parameters"][name]["weight"], saved["weight"])
    model = load_model(store.latest())
    assert all(torch.equal(p, state["parameters"][n]["weight"]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [2]), (2, [1, 2]), (3, [1, 2]), (None, [1, 2])])
def test_what_was_just_saved_stays_whatever_lies_beside_it(save, tmp_path, keep_last, kept):
    """Checkpoints of higher steps are not this run's: they neither count nor go."""
    save(1, keep_last)
    shutil.copytree(tmp_path / "checkpoints" / "step_1", tmp_path / "checkpoints" / "step_7")
    for other in ("step_007", "step_x", "step_²", "best"):
        (tmp_path / "checkpoints" / other).mkdir()
    path = save(2, keep_last)
    assert CheckpointStore(tmp_path, keep_last).steps() == [*kept, 7]
    assert CheckpointStore(tmp_path, keep_last).latest() == path
    assert path.is_dir()


def test_saving_a_step_again_sets_the_first_one_aside(save, tmp_path):
    save(1)
    (tmp_path / "checkpoints" / "step_1" / "note").write_text("mine")
    save(1)
    assert (tmp_path / "checkpoints.1" / "step_1" / "note").read_text() == "mine"
    assert CheckpointStore(tmp_path, 2).latest().name == "step_1"
    load_checkpoint(tmp_path / "checkpoints" / "step_1")


@pytest.mark.parametrize(
    "failing", ["store.save_hf", "store._sync_tree", "manifest.write_manifest", "shard_writer.write_tensor_file"]
)
def test_a_failed_write_leaves_the_previous_checkpoint_and_nothing_half_written(save, tmp_path, monkeypatch, failing):
    save(1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"vexact.trainer.checkpoint.{failing}", full)
    with pytest.raises(
        CheckpointError, match=r"could not write .*step_2 on .*: .*No space left.* MiB free.*default_local_dir"
    ):
        save(2)
    assert _names(tmp_path / "checkpoints") == ["step_1"]
    assert (tmp_path / "latest").read_text() == "checkpoints/step_1\n"


def test_a_full_disk_is_noticed_before_writing(save, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match="disk is full: a checkpoint needs"):
        save(1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed_and_never_resumed(save, tmp_path):
    save(1)
    (tmp_path / "checkpoints" / ".tmp-step_2").mkdir()
    store = CheckpointStore(tmp_path, 2)
    assert store.latest().name == "step_1"
    store.remove_leftovers()
    assert _names(store.directory) == ["step_1"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("killed_at", "survivor"),
    [("pathlib.Path.rename", "step_1"), ("vexact.trainer.checkpoint.pointer.LatestPointer.commit", "step_2")],
)
def test_killed_around_the_rename(save, tmp_path, monkeypatch, killed_at, survivor):
    """Before it the earlier checkpoint counts, after it the new one; `latest` names what is there in both cases."""
    save(1)

    def kill(self, *args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(killed_at, kill)
        with pytest.raises(Killed):
            save(2)
    store = CheckpointStore(tmp_path, 2)
    store.remove_leftovers()
    assert store.latest().name == survivor
    assert not (tmp_path / "latest.tmp").exists()
    load_checkpoint(store.latest())


@pytest.mark.parametrize("announced", ["checkpoints/step_1", "checkpoints/step_9\n", "", "\0", "checkpoints/../x\n"])
def test_an_announcement_that_names_nothing_is_dropped(save, tmp_path, announced):
    save(1)
    save(2)
    (tmp_path / "latest.tmp").write_text(announced)
    store = CheckpointStore(tmp_path, 2)
    store.remove_leftovers()
    assert store.latest().name == "step_2"


@pytest.mark.parametrize(
    ("latest", "message"),
    [
        ("checkpoints/step_9\n", "latest names checkpoints/step_9, which does not exist; step_2 is whole"),
        ("../other/checkpoints/step_2\n", "latest says '../other/checkpoints/step_2', which names no checkpoints/step"),
        ("", "latest says '', which names no"),
        ("checkpoints/step_02", "names no checkpoints/step_N of this run"),
        (None, "latest does not exist, so which of them this run goes on from is unknown; step_2 is whole"),
    ],
)
def test_a_latest_that_names_nothing_is_not_guessed(save, tmp_path, latest, message):
    save(1)
    save(2)
    (tmp_path / "latest").unlink()
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path, 2).latest()
    assert message in str(caught.value)
    assert f"trainer.resume_from_path={tmp_path}/checkpoints/step_2" in str(caught.value)
    assert "older: step_1, not checked" in str(caught.value)


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def _other(file):
    torch.save({"model": {}}, file)


def _pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


DAMAGE = {
    "cut": (_cut, "has .* bytes, but .* were saved", "damaged or cut short"),
    "flipped": (_flip, "is not what was saved: SHA-256", "is damaged: the checksum of .* differs|damaged or cut short"),
    "empty": (lambda file: file.write_bytes(b""), "has 0 bytes", "is empty"),
    "text": (lambda file: file.write_text("hello\n"), "has 6 bytes", "is not a file of torch.save"),
    "pointer": (_pointer, "is a Git LFS pointer", "is a Git LFS pointer.*git lfs pull"),
    "other": (_other, "has .* bytes", "is another program's file: it has no 'progress' and 'actor', only model"),
    "gone": (os.remove, "is missing", r"is not a checkpoint \(no trainer_state\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_with_a_whole_checkpoint_beside_it(save, tmp_path, kind):
    damage, message, _ = DAMAGE[kind]
    save(1)
    path = save(2)
    for file in (WEIGHTS, "model.safetensors", "config.json", "identity.json", "progress.json"):
        copy = shutil.copytree(path, tmp_path / "checkpoints" / "step_3", dirs_exist_ok=True)
        damage(copy / file)
        with pytest.raises(CheckpointError, match=rf"step_3/{file} ({message}).*step_2 is whole.*from_path=.*step_2"):
            load_checkpoint(copy)


@pytest.mark.parametrize("kind", DAMAGE)
def test_without_a_manifest_the_state_is_checked_by_itself(save, tmp_path, caplog, kind):
    """What an earlier version wrote: no manifest, no identity, no format."""
    damage, _, message = DAMAGE[kind]
    path = save(1)
    rewrite(path, 1)
    assert load_checkpoint(path)[0] == Progress(1, 10)
    assert "written by an earlier version" in caplog.text
    damage(path / "trainer_state.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"progress": (1,), "actor": {}}, r"'progress' is \(1,\); expected a step and a data cursor"),
        ({"progress": (-1, 0), "actor": {}}, r"'progress' is \(-1, 0\)"),
        ({"progress": (1, 0), "actor": {"parameters": {}}}, "'actor' lacks 'num_updates' or 'parameters'"),
        ({"progress": (1, 0), "actor": {"num_updates": 1, "parameters": []}}, "no parameters by name"),
        ([1, 2], "is another program's file"),
    ],
)
def test_a_state_with_other_contents(tmp_path, content, message):
    torch.save(content, tmp_path / "trainer_state.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_code_in_a_state_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "trainer_state.pt")
    with pytest.raises(CheckpointError, match=r"cannot read .*trainer_state\.pt"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_newer_format_and_an_edited_manifest_are_refused(save, monkeypatch):
    path = save(1)
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "FORMAT", 4)
        manifest.write_manifest(path, 1, {})
    with pytest.raises(CheckpointError, match=r"has checkpoint format 4, and .* reads up to format 3"):
        load_checkpoint(path)
    listed = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(listed | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"does not match its own SHA-256; it names format 99"):
        load_checkpoint(path)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load_checkpoint(path)


def test_a_directory_that_is_no_checkpoint_is_told_where_they_are(save, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a checkpoint \(no trainer_state\).*resume_mode=disable"):
        load_checkpoint(tmp_path)
    path = save(1)
    for wrong in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=rf"no trainer_state\).*step_1 is whole.*{path}"):
            load_checkpoint(wrong)


def test_the_manifest_lists_every_file(save):
    path = save(1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files.keys() == there - {"manifest.json"}
    assert there >= {WEIGHTS, "model.safetensors", "config.json", "identity.json", "progress.json"}
    assert not any(file.endswith((".pt", ".metadata", ".distcp")) for file in there), "nothing is a pickle"


def test_what_an_earlier_version_wrote_with_a_manifest_is_read_and_checked(save, state):
    path = save(1)
    rewrite(path, 2)
    progress, loaded = load_checkpoint(path)
    assert (progress, loaded["num_updates"]) == (Progress(1, 10), 7)
    assert all(torch.equal(loaded["parameters"][n]["weight"], s["weight"]) for n, s in state["parameters"].items())
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing, so nothing in .* can be checked"):
        load_checkpoint(path)


def test_without_its_manifest_nothing_is_checked_so_nothing_is_read(save):
    path = save(1)
    (path / "manifest.json").unlink()
    (path / "identity.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing, so nothing in .* can be checked"):
        load_checkpoint(path)
