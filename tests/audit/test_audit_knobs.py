"""Whatever the engine and the trainer's packing are set to, the audit finds no unequal bit."""

import random

import numpy as np
import pytest

from vexact.audit import Audit
from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.types import TrainSequence

CONFIG = ModelConfig.from_hf_dict(
    {
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
)
NUM_CASES = 50

pytestmark = pytest.mark.usefixtures("one_thread")


def _generate(rng):
    """Samples of random requests from an engine with random knobs."""
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
        )
        for _ in prompts
    ]
    page_size = rng.choice([1, 4, 16, 64])
    engine = Engine(
        model=random_model(CONFIG, seed=1),
        max_model_len=128,
        page_size=page_size,
        num_pages=rng.choice([-(-90 // page_size), None]),
        max_num_seqs=rng.choice([1, 3, 16]),
        max_num_batched_tokens=rng.choice([7, 64, 4096]),
        enable_prefix_caching=rng.random() < 0.5,
        seed=rng.randrange(100),
    )
    return engine.generate(prompts, params)


def _actor(rng, longest):
    config = ActorConfig(
        ppo_mini_batch_size=rng.choice([2, 3, 64]),
        ppo_max_token_len_per_gpu=longest + rng.choice([0, 1, 30, 4000]),
        balance_micro_batches=rng.random() < 0.5,
        shuffle=rng.random() < 0.5,
        enable_gradient_checkpointing=rng.random() < 0.5,
        optim=OptimConfig(lr=1e-2),
    )
    return Actor(random_model(CONFIG, seed=1), config)


def test_no_setting_of_either_side_makes_a_bit_differ():
    compared = 0
    for case in range(NUM_CASES):
        rng = random.Random(case)
        samples = _generate(rng)
        rng.shuffle(samples)
        actor = _actor(rng, max(sample.num_tokens for sample in samples))
        sequences = [TrainSequence(s, np.ones(len(s.token_ids), np.float32)) for s in samples]
        audit = Audit("strict")
        audit.begin(samples)
        metrics = actor.update(sequences, audit.check)
        assert metrics["actor/grad_norm"] > 0
        assert audit.metrics()["bitwise/tokens_different"] == 0
        compared += audit.metrics()["bitwise/tokens_compared"]
    assert compared > 1000
