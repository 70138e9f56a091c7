"""verl's save and load with vexact's state: training goes on with the same bits, on another number of ranks too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port
from transformers import AutoModelForCausalLM
from worker_support import Rollout, Step, make_prompts, make_worker

from vexact.trainer.checkpoint import CheckpointError
from vexact.weights.model_checksums import named_checksums


def train(worker, path, step):
    """One update on samples of fixed weights."""
    prompts = make_prompts(seed=step)
    batch = Step(prompts, Rollout(path, "bf16").generate(prompts, step))
    batch.train(worker, batch.rollout_logprobs, seed=step)


def state_of(worker):
    return {key: value.clone() for key, value in worker.engine.actor.sharded_state().items()}


def test_training_goes_on_with_the_same_bits(model_path, tmp_path):
    worker = make_worker(model_path, "bf16", save_contents=["model", "optimizer", "extra", "hf_model"])
    train(worker, model_path, 0)
    worker.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    train(worker, model_path, 1)
    resumed = make_worker(model_path, "bf16")
    resumed.load_checkpoint(str(tmp_path / "actor"))
    train(resumed, model_path, 1)
    ours, theirs = state_of(resumed), state_of(worker)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert int(ours["num_updates"]) == 2, "the schedule goes on, too"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "actor" / "huggingface")
    assert exported.num_parameters() == sum(p.numel() for p in worker.engine.module.parameters())


def test_weights_alone_can_be_saved_and_loaded(model_path, tmp_path):
    worker = make_worker(model_path, "bf16", save_contents=["model"])
    train(worker, model_path, 0)
    worker.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    other = make_worker(model_path, "bf16")
    other.load_checkpoint(str(tmp_path / "actor"))
    assert named_checksums(other.engine.module) == named_checksums(worker.engine.module)
    assert not any(key.startswith("exp_avg") for key in state_of(other))


def test_old_checkpoints_make_room(model_path, tmp_path):
    worker = make_worker(model_path, "bf16")
    for step in (1, 2, 3):
        worker.save_checkpoint(str(tmp_path / f"global_step_{step}" / "actor"), None, step, 2)
    assert sorted(path.parent.name for path in tmp_path.glob("*/actor")) == ["global_step_2", "global_step_3"]


def test_what_is_no_checkpoint_changes_nothing(model_path, tmp_path):
    worker = make_worker(model_path, "bf16")
    before = named_checksums(worker.engine.module)
    with pytest.raises(ValueError, match=r"trainer_state is missing; only checkpoints of actor\.strategy=vexact"):
        worker.load_checkpoint(str(tmp_path))
    worker.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    next((tmp_path / "actor" / "trainer_state").iterdir()).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no shard of a trainer state"):
        worker.load_checkpoint(str(tmp_path / "actor"))
    with pytest.raises(ValueError, match="not to hdfs://x"):
        worker.save_checkpoint(str(tmp_path / "b"), "hdfs://x")
    assert named_checksums(worker.engine.module) == before


def test_two_ranks_are_exact_and_one_goes_on_from_their_checkpoint(model_path, tmp_path):
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    script, port = Path(__file__).with_name("two_ranks.py"), [str(model_path), str(tmp_path)]
    ranks = [
        subprocess.Popen([sys.executable, script, *port], env=environment | {"RANK": rank}, stdout=subprocess.PIPE)
        for rank in "01"
    ]
    said = [json.loads(rank.communicate(timeout=300)[0].splitlines()[-1]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [each["different"] for each in said] == [[0, 0, 0], [0, 0, 0]]
    assert said[0]["tokens"] != said[1]["tokens"], "each rank has sequences of its own"
    assert said[0]["grad_norms"] == said[1]["grad_norms"]
    worker = make_worker(model_path, "bf16")
    worker.load_checkpoint(str(tmp_path / "actor"))
    assert named_checksums(worker.engine.module) == said[0]["checksums"] == said[1]["checksums"]
