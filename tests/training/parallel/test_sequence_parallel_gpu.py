"""Two GPUs that share micro-batches, one of their sequences long, against one GPU: equal bits in half the memory."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks_support import without_times

from vexact.config.memory.activations import activation_bytes
from vexact.models import ModelConfig, random_model
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.training.batches.packing import pack
from vexact.training.parallel.ranks import close_process_group
from vexact.types import Sample, TrainSequence

pytestmark = pytest.mark.multi_gpu
# Two micro-batches of up to 18 k tokens: a slice cuts the one long sequence, and holds no response token of the other.
LENGTHS = [(401, 15983), (1, 1), (37, 412), (300, 700), (5, 3), (18000, 20)]
BUDGET = 20480
SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 20480,
}
CASES = {
    "tied": ({"tie_word_embeddings": True}, {}),
    "untied, entropy": ({"tie_word_embeddings": False}, {"entropy_coeff": 0.01}),
    "one key head, checkpointed": (
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"enable_gradient_checkpointing": True},
    ),
}


def sequences():
    rng, made = np.random.default_rng(0), []
    for i, (prompt, response) in enumerate(LENGTHS):
        tokens = rng.integers(0, SIZES["vocab_size"], prompt + response).tolist()
        old = rng.normal(-10.0, 0.3, response).astype(np.float32)
        floor = np.full(response, -np.inf, np.float32)
        sample = Sample(f"request-{i}", tuple(tokens[:prompt]), tuple(tokens[prompt:]), old, floor, 1.0, "stop", 0)
        made.append(TrainSequence(sample, rng.normal(size=response).astype(np.float32), None))
    return made


def outcome(case, size, device):
    """Log-probabilities without and with gradients, metrics, and the bytes of an update beside weights and moments."""
    overrides, more = CASES[case]
    model = random_model(ModelConfig.from_hf_dict(SIZES | overrides), 0, device=device)
    settings = {"ppo_mini_batch_size": len(LENGTHS), "ppo_max_token_len_per_gpu": BUDGET // size, "dtype": "bfloat16"}
    config = ActorConfig(ulysses_sequence_parallel_size=size, optim=OptimConfig(lr=1e-4), **settings, **more)
    actor, audited, chosen = Actor(model, config, device), {}, sequences()
    logprobs = actor.logprobs(chosen)
    metrics = actor.update(chosen, lambda indices, values, _: audited.update(zip(indices, values, strict=True)))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    actor.update(chosen)  # the moments are there by now
    peak = torch.cuda.max_memory_allocated(device) - before
    lengths = [prompt + response - 1 for prompt, response in LENGTHS]
    num_tokens = max(sum(lengths[i] for i in group) for group in pack(lengths, BUDGET, balance=True))
    predicted = activation_bytes(model.config, num_tokens, 2, recomputed=model.recomputed_layers, sharing=size)
    return {
        "logprobs": logprobs,
        "audited": audited,
        "metrics": without_times(metrics),
        "peak": peak,
        "predicted": predicted,
    }


def work(rank, directory):
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = dist.FileStore(str(Path(directory) / "store"), 2)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=2)
    torch.save({case: outcome(case, 2, device) for case in CASES}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_two_gpus_give_the_bits_of_one_in_less_memory(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2, join=True)
    shared = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for case in CASES:
        alone = outcome(case, 1, torch.device("cuda", 0))
        close_process_group()
        for rank in (0, 1):
            two = shared[rank][case]
            for values, expected in zip(two["logprobs"], alone["logprobs"], strict=True):
                np.testing.assert_array_equal(values.view(np.int32), expected.view(np.int32))
            assert len(two["audited"]) == (len(LENGTHS) if rank == 0 else 0)
            for index, values in two["audited"].items():
                np.testing.assert_array_equal(values.view(np.int32), alone["audited"][index].view(np.int32))
            assert two["metrics"] == pytest.approx(alone["metrics"], rel=2e-2, abs=1e-5)
        figures = [
            f"{run['peak'] / 1e9:.2f} GB ({run['predicted'] / 1e9:.2f} GB of activations predicted)"
            for run in (alone, shared[0][case])
        ]
        sys.stderr.write(f"\n{case}: an update took {figures[0]} on one GPU, {figures[1]} on each of two\n")
        assert shared[0][case]["peak"] < alone["peak"]
