"""Weight transfer and its checksum."""

import numpy as np
import pytest
import torch

from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig
from vexact.types import TrainSequence
from vexact.weights import WeightSyncError, checksum, sync_weights

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


def test_checksum_of_small_tensors_by_hand():
    # Bits of int32 view: 1.0 is 0x3f800000 = 1065353216, -0.0 is -2^31; weights 1, 3.
    assert checksum(torch.tensor([1.0, -0.0])) == 1065353216 - 3 * 2**31
    assert checksum(torch.tensor([1.0], dtype=torch.bfloat16)) == 0x3F80
    assert checksum(torch.empty(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_flipped_bit_and_any_swap_changes_the_checksum(dtype):
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    original = checksum(tensor)
    view = torch.int32 if dtype is torch.float32 else torch.int16
    for index in range(tensor.numel()):
        flipped = tensor.clone()
        flipped.view(view).view(-1)[index] ^= 1
        assert checksum(flipped) != original
    assert checksum(tensor.flip(0)) != original
    assert checksum(tensor.t().contiguous().t()) == original  # memory layout does not matter


def test_chunks_continue_the_weights(monkeypatch):
    tensor = torch.randn(1000)
    whole = checksum(tensor)
    monkeypatch.setattr("vexact.weights.fingerprint.CHUNK", 7)
    assert checksum(tensor) == whole


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


class Corrupting:
    """An engine whose transfer loses one bit of one tensor."""

    def __init__(self):
        self.model = random_model(CONFIG, 2)

    def update_weights(self, named_tensors, version):
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                parameters[name].copy_(tensor)
            parameters["layers.0.mlp.down_proj.weight"].view(torch.int32)[3, 2] ^= 1


def test_one_lost_bit_stops_the_run_and_is_named():
    actor = Actor(random_model(CONFIG, 1), ActorConfig())
    with pytest.raises(WeightSyncError, match=r"version 3: layers\.0\.mlp\.down_proj\.weight has checksum"):
        sync_weights(actor, Corrupting(), 3)
