"""Whatever the engine and the trainer's packing are set to, the audit finds no unequal bit and no other expert."""

import copy
import random

import numpy as np
import pytest
import torch
from moe_configs import MOONLIGHT, QWEN3_MOE, with_router_biases

from vexact.audit import Audit
from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.types import TrainSequence

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
DTYPES = ((torch.float32, "float32"), (torch.float32, "bfloat16"), (torch.bfloat16, "bfloat16"))
"""Types of the trainer's weights and of both forwards."""
CASES = {
    "dense": (QWEN2, 50, DTYPES[:1]),
    "qwen3-moe": (QWEN3_MOE, 50, DTYPES),
    "moonlight": (MOONLIGHT | {"num_hidden_layers": 2}, 50, DTYPES),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def _model(raw, dtype):
    return with_router_biases(random_model(ModelConfig.from_hf_dict(raw), 1, dtype))


def _generate(rng, model):
    """Samples of random requests from an engine with random knobs, and how many were preempted."""
    prompts = [
        [rng.randrange(61) for _ in range(rng.choice([1, 5, 15, 16, 17, 63, 65]))] for _ in range(rng.randint(2, 5))
    ]
    params = [
        SamplingParams(
            n=rng.choice([1, 2, 4]),
            max_tokens=rng.choice([1, 6, 20]),
            temperature=rng.choice([0.0, 0.5, 0.9, 1.0]),
            top_k=rng.choice([-1, 7]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
        )
        for _ in prompts
    ]
    page_size = rng.choice([1, 4, 16, 64])
    engine = Engine(
        model=model,
        max_model_len=128,
        page_size=page_size,
        num_pages=rng.choice([-(-90 // page_size), -(-90 // page_size), None]),
        max_num_seqs=rng.choice([1, 3, 16]),
        max_num_batched_tokens=rng.choice([7, 64, 4096]),
        enable_prefix_caching=rng.random() < 0.5,
        seed=rng.randrange(100),
    )
    return engine.generate(prompts, params), engine.stats()["rollout/preemptions"]


def _actor(rng, longest, model, dtype):
    config = ActorConfig(
        dtype=dtype,
        ppo_mini_batch_size=rng.choice([2, 3, 64]),
        ppo_max_token_len_per_gpu=longest + rng.choice([0, 1, 30, 4000]),
        balance_micro_batches=rng.random() < 0.5,
        shuffle=rng.random() < 0.5,
        enable_gradient_checkpointing=rng.random() < 0.5,
        recompute_num_layers=rng.choice([None, 0, 1]),
        router_aux_loss_coef=0.1 if model.chooses_experts and rng.random() < 0.3 else 0.0,
        optim=OptimConfig(lr=1e-2),
    )
    return Actor(model, config)


@pytest.mark.parametrize("name", CASES)
def test_no_setting_of_either_side_makes_a_bit_differ(name):
    raw, num_cases, dtypes = CASES[name]
    models = {dtype: _model(raw, dtype) for pair in dtypes for dtype in (pair[0], getattr(torch, pair[1]))}
    compared = preempted = 0
    for case in range(num_cases):
        rng = random.Random(case)
        master, dtype = dtypes[case % len(dtypes)]
        samples, preemptions = _generate(rng, models[getattr(torch, dtype)])
        rng.shuffle(samples)
        longest = max(sample.num_tokens for sample in samples)
        actor = _actor(rng, longest, copy.deepcopy(models[master]), dtype)
        sequences = [TrainSequence(s, np.ones(len(s.token_ids), np.float32)) for s in samples]
        audit = Audit("strict")
        audit.begin(samples)
        metrics = actor.update(sequences, audit.check)
        assert metrics["actor/grad_norm"] > 0
        found = audit.metrics()
        assert found["bitwise/tokens_different"] == 0
        if raw is QWEN2:
            assert "bitwise/routes_compared" not in found
        else:
            assert found["bitwise/routes_different"] == 0
            assert found["bitwise/routes_compared"] == found["bitwise/tokens_compared"]
        compared += found["bitwise/tokens_compared"]
        preempted += preemptions
    assert compared > 20 * num_cases
    assert preempted > 3
