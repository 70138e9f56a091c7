"""Two GPUs over NCCL against one, in bf16: the same weights, moments and metrics after three steps."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from moe_configs import MOONLIGHT, QWEN3_MOE
from ranks import process_group
from ranks_support import digest, without_times
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
EXPERTS = SIZES | {  # 15 of them, which two ranks do not divide
    **{key: QWEN3_MOE[key] for key in ("architectures", "model_type", "norm_topk_prob")},
    **{"num_experts": 15, "num_experts_per_tok": 4, "moe_intermediate_size": 384},
}
LATENT = MOONLIGHT | {
    **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "initializer_range")},
    **{"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024},
    **{"kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_routed_experts": 15, "num_experts_per_tok": 4, "moe_intermediate_size": 384},
}
VARIANTS = {
    "tied": (SIZES, {}),
    "untied, all offloaded": (
        SIZES | {"tie_word_embeddings": False},
        {"param_offload": True, "optimizer_offload": True, "enable_gradient_checkpointing": True},
    ),
    "experts": (EXPERTS, {"router_aux_loss_coef": 0.01}),
    "latent attention and experts": (
        LATENT,
        {"router_bias_update_rate": 0.001, "param_offload": True, "enable_gradient_checkpointing": True},
    ),
    "shared experts": (EXPERTS | {"num_experts": 16}, {"router_aux_loss_coef": 0.01}),
    "latent attention, shared experts": (
        LATENT | {"n_routed_experts": 16},
        {"router_bias_update_rate": 0.001, "param_offload": True, "enable_gradient_checkpointing": True},
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
        alone = [dist.new_group([each]) for each in range(2)]  # as many groups for both
        groups = {1: alone[rank], 2: dist.new_group([0, 1])}
        for name, (shape, extra) in VARIANTS.items():
            for world, group in groups.items():
                if rank < world:
                    config = {"dtype": "bfloat16", "ppo_mini_batch_size": 13, "ppo_max_token_len_per_gpu": 1024}
                    config |= {"optim": OptimConfig(lr=1e-4)} | extra
                    if "shared" in name:
                        config["expert_parallel_size"] = world
                    model = random_model(ModelConfig.from_hf_dict(shape), 0, device=f"cuda:{rank}")
                    actor = Actor(model, ActorConfig(**config), f"cuda:{rank}", group)
                    metrics = [without_times(actor.update(sequences(step))) for step in range(3)]
                    scored = actor.rescore(sequences(9))
                    values = [array.tobytes() for array in (*scored.logprobs, *(scored.routes or ()))]
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
