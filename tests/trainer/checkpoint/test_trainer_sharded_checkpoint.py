"""A state written by some ranks and read by others: 2 to 1 and 1 to 2 over Gloo, other numbers from the files."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from saved_runs import flat, rewrite
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from training_support import assert_same_bits, random_sequences, tiny_actor, weights_of

from vexact.models import load_model
from vexact.trainer.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Progress,
    Saver,
    ShardWriter,
    Written,
    load_checkpoint,
    restore,
    verify_checkpoint,
)
from vexact.trainer.checkpoint.host_copy import HostCopy
from vexact.trainer.checkpoint.shard_files import row_range
from vexact.trainer.checkpoint.shard_reader import ShardedState
from vexact.training import PeerStopped

CONFIG = {"ppo_mini_batch_size": 6, "ppo_max_token_len_per_gpu": 64}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def trained(seed):
    actor = tiny_actor(seed=seed, **CONFIG)
    actor.update(random_sequences(12, seed=seed))
    return actor


def save(root, step, actor, shards=None):
    store = CheckpointStore(root, None)
    with Saver(store, shards or ShardWriter(actor.sharded_state)) as saver:
        saver.save(Progress(step, step), actor.model.config, lambda path: None, {})
    return store.path(step)


def equal(a, b):
    assert a.keys() == b.keys()
    for name, parts in a.items():
        assert parts.keys() == b[name].keys()
        assert all(torch.equal(torch.as_tensor(p), torch.as_tensor(b[name][key])) for key, p in parts.items()), name
    return True


class Both:
    """The driver's view of two ranks, on rank 0 of them: what a group of workers does with calls."""

    def __init__(self, writer):
        self.writer = writer

    def _joined(self, ours):
        every = [None, None]
        dist.all_gather_object(every, ours)
        return None if None in every else [written for each in every for written in each]

    def save(self, step, directory, background):
        box = [directory]
        dist.broadcast_object_list(box, src=0)
        return self._joined(self.writer.save(step, box[0], background))

    def wait(self):
        return self._joined(self.writer.wait())

    def abandon(self):
        self.writer.abandon()


def two_ranks(rank, root):
    torch.set_num_threads(1)
    root = Path(root)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 2), rank=rank, world_size=2)
    actor = trained(seed=3)
    actor.logprobs(random_sequences(4, seed=5))
    whole = actor.state_dict()
    both = Both(ShardWriter(actor.sharded_state, rank, 2))
    if rank == 0:
        save(root, 1, actor, both)
    else:
        both.save(1, None, False)
    background = Saver(CheckpointStore(root, None), both, in_background=True)
    if rank == 0:
        background.save(Progress(2, 2), actor.model.config, lambda path: None, {})
    else:
        both.save(2, None, True)
    actor.update(random_sequences(12, seed=9))
    if rank == 0:
        background.finish()
        torch.save(whole, root / "whole.pt")
    else:
        both.wait()

    dist.barrier()
    for step in ("step_7", "step_8"):  # of one process, in this format and the one before
        verify_checkpoint(root / "checkpoints" / step)
        other = tiny_actor(seed=99, **CONFIG)
        assert restore(root / "checkpoints" / step, other).step == int(step[5:])
        again = other.state_dict()
        if rank == 0:
            torch.save(again, root / f"{step}.pt")
    before = other.state_dict()
    with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
        restore(root / "wide" / "checkpoints" / "step_1", other)
    error, where = [(PeerStopped, "step_7"), (CheckpointError, "step_99")][rank]  # rank 1 sees another directory
    with pytest.raises(error, match="is not a checkpoint"):
        restore(root / "checkpoints" / where, other)
    assert equal(other.state_dict()["parameters"], before["parameters"])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A directory with what two ranks wrote and read, and the state of the one process whose they read."""
    alone, wide = trained(seed=4), tiny_actor(seed=1, **CONFIG)
    state = wide.state_dict()
    state["parameters"]["norm.weight"]["weight"] = torch.zeros(33)

    def saved():
        root = tmp_path_factory.mktemp("two")
        for step in (7, 8):
            save(root, step, alone)
        rewrite(root / "checkpoints" / "step_8", 2)
        save(root / "wide", 1, wide, ShardWriter(lambda: flat(state)))
        return (str(root),)

    (root,) = spawn(two_ranks, 2, saved)
    return Path(root), alone.state_dict()


def test_one_process_reads_what_two_ranks_wrote(ranks):
    root, _ = ranks
    whole = torch.load(root / "whole.pt", weights_only=True)
    for step in (1, 2):
        path = root / "checkpoints" / f"step_{step}"
        assert sorted(file.name for file in (path / "trainer_state").iterdir()) == sorted(
            f"{kind}-0000{rank}-of-00002.safetensors" for kind in KINDS for rank in (1, 2)
        )
        progress, loaded = load_checkpoint(path)
        assert (progress.step, loaded["num_updates"]) == (step, whole["num_updates"])
        assert equal(loaded["parameters"], whole["parameters"])
        actor = tiny_actor(seed=99, **CONFIG)
        restore(path, actor)
        assert equal(actor.state_dict()["parameters"], whole["parameters"])


def test_two_ranks_read_what_one_process_wrote(ranks):
    root, alone = ranks
    for step in ("step_7", "step_8"):
        read = torch.load(root / f"{step}.pt", weights_only=True)
        assert read["num_updates"] == alone["num_updates"]
        assert equal(read["parameters"], alone["parameters"])


def test_the_export_of_two_ranks_is_the_model(ranks):
    root, _ = ranks
    path = root / "checkpoints" / "step_1"
    actor = tiny_actor(seed=99, **CONFIG)
    restore(path, actor)
    assert_same_bits(dict(load_model(path).named_parameters()), weights_of(actor))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 64])
def test_any_number_of_ranks_reads_every_row_once(ranks, world_size):
    root, _ = ranks
    state = ShardedState(root / "checkpoints" / "step_1" / "trainer_state")
    whole = torch.load(root / "whole.pt", weights_only=True)["parameters"]
    assert state.tensors.keys() == {f"{kind}.{name}" for name in whole for kind in KINDS}
    for key, stored in state.tensors.items():
        kind, _, name = key.partition(".")
        count = stored.shape[0]
        size = -(-count // world_size)
        edges = [(min(r * size, count), min((r + 1) * size, count)) for r in range(world_size)]
        assert torch.equal(torch.cat([stored.rows(*edge) for edge in edges]), whole[name][kind])


def test_torchs_own_reader_reads_it(ranks):
    """The layout is that of torch.distributed.checkpoint with safetensors."""
    root, _ = ranks
    whole = torch.load(root / "whole.pt", weights_only=True)["parameters"]
    into = {f"{kind}.{name}": torch.zeros_like(parts[kind]) for name, parts in whole.items() for kind in KINDS}
    reader = HuggingFaceStorageReader(str(root / "checkpoints" / "step_1" / "trainer_state"))
    load(into, storage_reader=reader, no_dist=True)
    assert all(torch.equal(into[f"{kind}.{n}"], parts[kind]) for n, parts in whole.items() for kind in KINDS)


def test_one_changed_bit_in_any_file_is_found(ranks, tmp_path):
    root, _ = ranks
    path = shutil.copytree(root / "checkpoints" / "step_1", tmp_path / "step_1")
    assert verify_checkpoint(path) == 1
    for name in ("trainer_state/exp_avg_sq-00002-of-00002.safetensors", "config.json", "model.safetensors"):
        file = path / name
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            verify_checkpoint(path)
        file.write_bytes(data)


def _header(file, change):
    """Rewrites what a file says in its header's metadata."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _say(file, **changes):
    def change(header):
        ours = json.loads(header["__metadata__"]["vexact"]) | changes
        header["__metadata__"]["vexact"] = json.dumps(ours)

    _header(file, change)


def _offset(file, row):
    def change(header):
        offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        offsets["weight.norm.weight"]["saved_offsets"] = [row]
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)

    _header(file, change)


W1, W2 = (f"weight-0000{rank}-of-00002.safetensors" for rank in (1, 2))
UNSOUND = {
    "missing": (lambda d: (d / W2).unlink(), rf"{W2} is missing"),
    "missing kind": (lambda d: [f.unlink() for f in d.glob("weight*")], rf"{W1} is missing"),
    "more ranks": (lambda d: shutil.copy(d / W2, d / "weight-00003-of-00003.safetensors"), "shards of 2, 3 ranks"),
    "huge world": (
        lambda d: [f.rename(f.with_name(f.name.replace("of-00002", "of-99999999999"))) for f in d.iterdir()],
        "00003-of-99999999999.safetensors is missing",
    ),
    "another step": (lambda d: _say(d / W2, step=5), rf"{W2} is of another state than {W1}: step 5, not 1"),
    "other updates": (lambda d: _say(d / W2, num_updates=9), rf"{W2} is of another state"),
    "no shapes": (lambda d: _say(d / W1, shapes=[1]), "are no shapes by name"),
    "negative step": (lambda d: _say(d / W1, step=-1), "are no counts"),
    "unknown field": (lambda d: _say(d / W1, more=1), "is no shard of a trainer state"),
    "gap": (lambda d: _offset(d / W2, 17), r"rows 16 to 17 of weight.norm.weight are in no file|is no part"),
    "overlap": (lambda d: _offset(d / W2, 3), "rows 3 to 16 of weight.norm.weight are twice"),
    "beyond": (lambda d: _offset(d / W2, 1000), "at row 1000 is no part of a tensor of shape"),
    "foreign": (
        lambda d: shutil.copy(d.parent / "model.safetensors", d / W1),
        f"{W1} is no shard of .*: lacks 'vexact'",
    ),
    "text": (lambda d: (d / W1).write_text("hello"), f"{W1} is no shard of a trainer state"),
    "empty": (lambda d: (d / W1).write_bytes(b""), f"{W1} is no shard of a trainer state"),
    "none": (lambda d: [f.unlink() for f in d.iterdir()], "holds no shard of a trainer state"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_files_that_make_up_no_whole_are_refused_by_name(ranks, tmp_path, kind):
    """With a manifest that says all is well, so that only the reader can find out."""
    root, _ = ranks
    directory = shutil.copytree(root / "checkpoints" / "step_1", tmp_path / "step_1") / "trainer_state"
    damage, message = UNSOUND[kind]
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        ShardedState(directory)


def test_no_pickle_of_a_foreign_checkpoint_runs(ranks, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "ran",)

    root, _ = ranks
    path = shutil.copytree(root / "checkpoints" / "step_1", tmp_path / "step_1")
    for name in (".metadata", "__0_0.distcp", "weight.pt"):
        (path / "trainer_state" / name).write_bytes(pickle.dumps(Evil()))
    load_checkpoint(path)
    for file in (path / "trainer_state" / W1, path / "progress.json"):
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError, match=file.name):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match=file.name):
            restore(path, tiny_actor(**CONFIG))
        file.write_bytes(content)
    assert not (tmp_path / "ran").exists()


def test_a_rank_whose_disk_is_another_one_is_named(tmp_path):
    actor = tiny_actor(**CONFIG)
    writer = ShardWriter(actor.sharded_state)

    class Elsewhere:
        def save(self, step, directory, background):
            lost = Written("trainer_state/weight-00002-of-00002.safetensors", 1, "node7", 123, "0" * 64)
            return [*writer.save(step, directory), lost]

        def abandon(self):
            writer.abandon()

    with pytest.raises(
        CheckpointError, match=r"rank 1 on node7 wrote 123 bytes .*no such file.*disk that all nodes share"
    ):
        save(tmp_path, 1, actor, Elsewhere())
    assert list((tmp_path / "checkpoints").iterdir()) == []
    with pytest.raises(CheckpointError, match="is the run directory on a disk that all nodes share"):
        ShardWriter(actor.sharded_state, 1, 2).save(1, tmp_path / "checkpoints" / "none" / "trainer_state")


def test_a_rank_that_fails_leaves_nothing(tmp_path):
    actor = tiny_actor(**CONFIG)

    class Failing(ShardWriter):
        def save(self, step, directory, background=False):
            super().save(step, directory, background)
            raise CheckpointError("rank 1 is dead")

    save(tmp_path, 1, actor)
    with pytest.raises(CheckpointError, match="rank 1 is dead"):
        save(tmp_path, 2, actor, Failing(actor.sharded_state))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


@pytest.mark.parametrize("most", [1, 24, 1 << 20])
def test_a_copy_in_buffers_of_any_size_is_the_tensors(monkeypatch, most):
    monkeypatch.setattr("vexact.trainer.checkpoint.host_copy._MOST_BYTES", most)
    tensors = [torch.randn(3, 5), torch.zeros(0), torch.randn(7).to(torch.bfloat16), torch.randn(4, 2).t()]
    copy = HostCopy()
    for _ in range(2):
        pieces = copy.take(tensors)
        copy.wait()
        for tensor, parts in zip(tensors, pieces, strict=True):
            copied = torch.cat([torch.empty(0, dtype=torch.uint8), *parts])
            assert torch.equal(copied, tensor.contiguous().view(-1).view(torch.uint8))
        tensors = [tensor + 1 for tensor in tensors]


def test_rows_of_a_whole_tensor():
    assert row_range(torch.zeros(5, 2)) == (0, 5)
