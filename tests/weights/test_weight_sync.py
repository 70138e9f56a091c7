"""Weight transfer and its checksum."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig
from vexact.types import TrainSequence
from vexact.weights import WeightSyncError, receive_weights, sync_weights
from vexact.weights.transfer import Incoming

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


def flat(engine, name):
    return dict(engine.model.named_parameters())[name].detach().view(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 640])
def test_one_lost_bit_stops_the_run_and_is_named(monkeypatch, dtype, bucket_bytes):
    """A direct copy and one through buckets; the bit is lost after the tensor arrived. A good sync mends it."""
    actor = Actor(random_model(CONFIG, 1), ActorConfig(dtype=dtype))
    engine = Engine(model=random_model(CONFIG, 2, getattr(torch, dtype)), dtype=dtype, max_model_len=64)
    name, checksums = "layers.0.mlp.down_proj.weight", Incoming.checksums

    def lossy(self):
        flat(engine, name).view(torch.uint8)[37] ^= 1
        return checksums(self)

    monkeypatch.setattr(Incoming, "checksums", lossy)
    with pytest.raises(WeightSyncError, match=rf"version 3: {name} \(bucket \d+\) has checksum -?\d+ in the") as caught:
        sync_weights(actor, engine, 3, bucket_bytes=bucket_bytes)
    found = caught.value.difference
    assert (found.tensor, found.sender, found.receiver, found.num_more) == (name, 0, 0, 0)
    assert found.sent != found.held
    with pytest.raises(RuntimeError, match="update the weights before generating"):
        engine.generate([[1]], SamplingParams(max_tokens=1))
    monkeypatch.undo()
    sync_weights(actor, engine, 4, bucket_bytes=bucket_bytes)
    assert engine.generate([[1]], SamplingParams(max_tokens=1))[0].weights_version == 4


def test_a_lone_process_copies_directly_and_casts_a_bucket_at_a_time(monkeypatch):
    """Tensors that are as they travel are not copied on the way; of others no more than a bucket exists at once."""
    seen, put = [], Incoming.put

    def watched(self, bucket, values):
        seen.append(values)
        put(self, bucket, values)

    monkeypatch.setattr(Incoming, "put", watched)
    actor = Actor(random_model(CONFIG, 1), ActorConfig())
    sync_weights(actor, Engine(model=random_model(CONFIG, 2), max_model_len=64), 1, bucket_bytes=640)
    homes = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in actor.model.parameters()]
    pieces = [values.data_ptr() for bucket in seen for values in bucket]
    assert len(pieces) > len(homes)
    assert all(any(begin <= address < end for begin, end in homes) for address in pieces)
    seen.clear()
    engine = Engine(model=random_model(CONFIG, 2, torch.bfloat16), max_model_len=64)
    sync_weights(Actor(random_model(CONFIG, 1), ActorConfig(dtype="bfloat16")), engine, 1, bucket_bytes=640)
    assert max(sum(values.nbytes for values in bucket) for bucket in seen) <= 640


def test_what_does_not_fit_is_refused_before_anything_changes():
    actor = Actor(random_model(CONFIG, 1), ActorConfig())
    engine = Engine(model=random_model(CONFIG, 2, torch.bfloat16), max_model_len=64)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    with pytest.raises(ValueError, match=r"'embed_tokens\.weight' is torch\.float32, expected torch\.bfloat16"):
        sync_weights(actor, engine, 1)
    engine.add_request([1], SamplingParams(max_tokens=2))
    with pytest.raises(RuntimeError, match="unfinished requests"):
        sync_weights(actor, engine, 1)
    engine.abort_all()
    assert engine.weights_version == 0
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())


def test_processes_without_a_group_are_told(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # a sharded actor of another test may have started one
    with pytest.raises(ValueError, match=r"over a process group; start torch\.distributed first"):
        receive_weights(Engine(model=random_model(CONFIG, 2), max_model_len=64), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("bucket_bytes", [256 * 2**20, 4096])
def test_masters_on_a_gpu_reach_the_engine_bit_for_bit(monkeypatch, bucket_bytes):
    actor = Actor(random_model(CONFIG, 1, device="cuda"), ActorConfig(dtype="bfloat16"), "cuda")
    engine = Engine(model=random_model(CONFIG, 2, torch.bfloat16, "cuda"), max_model_len=64, num_pages=8)
    metrics = sync_weights(actor, engine, 1, bucket_bytes=bucket_bytes)
    expected = dict(random_model(CONFIG, 1).named_parameters())
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter.cpu(), expected[name].bfloat16()), name
    assert {name for name in metrics if "timing_s" in name} == {
        f"timing_s/weights_{p}" for p in ("cast", "copy", "check")
    }
    checksums = Incoming.checksums
    monkeypatch.setattr(
        Incoming, "checksums", lambda self: flat(engine, "norm.weight").neg_() is None or checksums(self)
    )
    with pytest.raises(WeightSyncError, match=r"version 2: norm\.weight"):
        sync_weights(actor, engine, 2, bucket_bytes=bucket_bytes)
