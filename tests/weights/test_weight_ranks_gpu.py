"""Weights between two GPUs over NCCL: both train and generate, or one trains for the other."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from weight_ranks import RAW, flip_first_bit_of, on_arrival

from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig
from vexact.weights import WeightSyncError, receive_weights, send_weights, sync_weights

SIZES = {"vocab_size": 1021, "hidden_size": 256, "intermediate_size": 500, "head_dim": 64, "tie_word_embeddings": True}
CONFIG = ModelConfig.from_hf_dict(RAW | SIZES)
DOWN = "layers.1.mlp.down_proj.weight"
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def actor(seed, group=None, **config):
    return Actor(random_model(CONFIG, seed, device="cuda"), ActorConfig(dtype="bfloat16", **config), "cuda", group)


def engine(seed):
    return Engine(model=random_model(CONFIG, seed, torch.bfloat16, "cuda"), max_model_len=64, num_pages=8)


def samples(held):
    return [sample.logprobs.tobytes() for sample in held.generate([[1, 2, 3], [4]], PARAMS, ["a", "b"])]


def expect(held, seed):
    for name, parameter in random_model(CONFIG, seed).named_parameters():
        assert torch.equal(dict(held.model.named_parameters())[name].cpu(), parameter.bfloat16()), name
    assert samples(held) == samples(engine(seed))


def flipped_on_rank_1(rank):
    return on_arrival(flip_first_bit_of(DOWN, 0)) if rank == 1 else contextlib.nullcontext()


def run(rank, directory):
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(directory) / "store"), 2)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    alone = dist.new_group([0])
    held = engine(50)
    for version, (size, offload) in enumerate([(1 << 28, False), (2 * 1024, False), (1 << 16, True)], 1):
        samples(held)  # captures graphs, which then read the new weights
        sync_weights(actor(version, param_offload=offload), held, version, bucket_bytes=size)
        expect(held, version)
    trainer = actor(7)
    with (
        flipped_on_rank_1(rank),
        pytest.raises(WeightSyncError, match=rf"version 7: {DOWN} .* rollout of rank 1, rank 0 sent"),
    ):
        sync_weights(trainer, held, 7)

    source = actor(8, alone) if rank == 0 else None
    for version, size in enumerate([1 << 28, 1024], 8):
        send_weights(source, version, bucket_bytes=size) if rank == 0 else receive_weights(held, version)
        if rank == 1:
            expect(held, 8)
            assert held.weights_version == version
            held.update_weights(random_model(CONFIG, 50, torch.bfloat16, "cuda").named_parameters(), 0)
    with (
        flipped_on_rank_1(rank),
        pytest.raises(WeightSyncError, match=rf"version 10: {DOWN} .* rollout of rank 1, rank 0 sent"),
    ):
        send_weights(source, 10) if rank == 0 else receive_weights(held, 10)
    dist.destroy_process_group()


@pytest.mark.multi_gpu
def test_weights_between_two_gpus(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2, join=True)
