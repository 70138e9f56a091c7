"""Weight transfer and its checksum."""

import numpy as np
import pytest
import torch

from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig
from vexact.types import TrainSequence
from vexact.weights import sync_weights

CONFIG = ModelConfig.from_hf_dict(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_generates_with_the_synced_weights(dtype):
    actor = Actor(random_model(CONFIG, 1), ActorConfig(dtype=dtype))
    engine = Engine(model=random_model(CONFIG, 2, getattr(torch, dtype)), dtype=dtype, max_model_len=64)
    params = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True)
    stale = engine.generate([[1, 2, 3]], params, request_ids=["a"])[0]
    metrics = sync_weights(actor, engine, 5)
    fresh = engine.generate([[1, 2, 3]], params, request_ids=["a"])[0]
    assert stale.logprobs.tobytes() != fresh.logprobs.tobytes()
    assert fresh.weights_version == 5
    assert metrics["rollout/weights_bytes"] == sum(t.numel() * t.element_size() for _, t in actor.named_weights())
    same = Engine(model=random_model(CONFIG, 1, getattr(torch, dtype)), dtype=dtype, max_model_len=64)
    expected = same.generate([[1, 2, 3]], params, request_ids=["a"])[0]
    assert fresh.token_ids == expected.token_ids
    assert fresh.logprobs.tobytes() == expected.logprobs.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_reproduces_the_sampled_logprobs_bit_for_bit(dtype):
    actor = Actor(random_model(CONFIG, 1), ActorConfig(dtype=dtype, ppo_max_token_len_per_gpu=40))
    engine = Engine(model=random_model(CONFIG, 2, getattr(torch, dtype)), dtype=dtype, max_model_len=64)
    sync_weights(actor, engine, 1)
    params = SamplingParams(n=3, max_tokens=12, temperature=0.7, top_p=0.9, top_k=20, ignore_eos=True)
    samples = engine.generate([[1, 2, 3], list(range(1, 20))], params)
    sequences = [TrainSequence(s, np.zeros(len(s.token_ids), np.float32)) for s in samples]
    for sample, logprobs in zip(samples, actor.logprobs(sequences), strict=True):
        np.testing.assert_array_equal(logprobs.view(np.int32), sample.logprobs.view(np.int32))
