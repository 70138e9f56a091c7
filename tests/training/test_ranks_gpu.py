"""Two GPUs over NCCL against one, in bf16: the same weights, moments and metrics after three steps."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks_support import digest, process_group, without_times
from training_support import TINY

from vexact.models import ModelConfig, random_model
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.types import Sample, TrainSequence

pytestmark = pytest.mark.multi_gpu
SIZES = TINY | {
    "vocab_size": 32771,  # odd, so that shards differ in size and lie at odd addresses
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}
VARIANTS = {
    "tied": ({}, {}),
    "untied, all offloaded": (
        {"tie_word_embeddings": False},
        {"param_offload": True, "optimizer_offload": True, "enable_gradient_checkpointing": True},
    ),
}


def sequences(step):
    rng, made = np.random.default_rng(step), []
    for i in range(21):
        prompt, response = (tuple(rng.integers(0, 32771, rng.integers(20, 300)).tolist()) for _ in range(2))
        old = rng.normal(-10.0, 0.3, len(response)).astype(np.float32)
        floor = np.full(len(response), -np.inf, np.float32)
        sample = Sample(f"request-{i}", prompt, response, old, floor, 1.0, "stop", 0)
        made.append(TrainSequence(sample, rng.normal(size=len(response)).astype(np.float32)))
    return made


def run(rank, directory):
    torch.cuda.set_device(rank)
    found = {}
    with process_group(rank, 2, directory, "cpu:gloo,cuda:nccl"):
        groups = {world: dist.new_group(range(world)) for world in (1, 2)}
        for name, (shape, extra) in VARIANTS.items():
            for world, group in groups.items():
                if rank < world:
                    config = {"dtype": "bfloat16", "ppo_mini_batch_size": 13, "ppo_max_token_len_per_gpu": 1024}
                    config |= {"optim": OptimConfig(lr=1e-4)} | extra
                    model = random_model(ModelConfig.from_hf_dict(SIZES | shape), 0, device=f"cuda:{rank}")
                    actor = Actor(model, ActorConfig(**config), f"cuda:{rank}", group)
                    metrics = [without_times(actor.update(sequences(step))) for step in range(3)]
                    values = [array.tobytes() for array in actor.logprobs(sequences(9))]
                    found[name, world] = digest(actor.state_dict()), metrics, values
                    del actor, model
                    torch.cuda.empty_cache()
                dist.barrier()
    torch.save(found, f"{directory}/{rank}.pt")


def test_two_gpus_train_the_bits_of_one(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name in VARIANTS:
        sha, metrics, values = first[name, 1]
        assert first[name, 2] == (sha, metrics, values), name
        assert second[name, 2][1:] == (metrics, values), name
