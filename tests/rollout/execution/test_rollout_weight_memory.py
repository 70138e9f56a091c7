"""The rollout's weights give their memory back; nobody can read or write them until an update has brought all anew."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_configs import FAMILIES
from rollout_models import VOCAB, bits, sampled_by_graphs, tiny_config

from vexact.models import ModelConfig, random_model, save_hf
from vexact.models.checkpoint import CheckpointReader
from vexact.models.hf_names import to_hf
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.execution.weight_memory import AbsentWeight
from vexact.training import Actor, ActorConfig
from vexact.weights import named_checksums, sync_weights

PARAMS = SamplingParams(n=2, max_tokens=6, ignore_eos=True)
PROMPTS = [[1, 2, 3], list(range(40))]
AWAY = "the rollout's weights are given back"


def saved(path: Path, config: ModelConfig, seed: int = 0) -> Path:
    save_hf(random_model(config, seed).named_parameters(), config, path)
    return path


def sleeper(path: Path, **more) -> Engine:
    return Engine(path, enable_sleep_mode=True, max_model_len=64, page_size=4, **more)


def samples(engine):
    found = engine.generate(PROMPTS, PARAMS, ["a", "b"])
    return [(s.token_ids, bits(s.logprobs)) for s in found]


@pytest.fixture
def engine(tmp_path):
    return sleeper(saved(tmp_path / "model", tiny_config()))


READS = {
    "an element": lambda weight, model: weight[0, 0],
    "to the host": lambda weight, model: weight.cpu(),
    "numpy": lambda weight, model: np.asarray(weight),
    "numbers": lambda weight, model: weight.tolist(),
    "compare": lambda weight, model: torch.equal(weight, torch.zeros(weight.shape)),
    "into another": lambda weight, model: torch.zeros(weight.shape).copy_(weight),
    "overwrite": lambda weight, model: weight.copy_(torch.zeros(weight.shape)),
    "fill": lambda weight, model: weight.fill_(0),
    "arithmetic": lambda weight, model: weight + 1,
    "view": lambda weight, model: weight.view(torch.uint8),
    "detach": lambda weight, model: weight.detach(),
    "data": lambda weight, model: weight.data,
    "address": lambda weight, model: weight.data_ptr(),
    "storage": lambda weight, model: weight.untyped_storage(),
    "embedding": lambda weight, model: torch.nn.functional.embedding(torch.tensor([1]), weight),
    "logits": lambda weight, model: model.logits(torch.ones(1, weight.shape[1])),
    "checksums": lambda weight, model: named_checksums(model),
    "state": lambda weight, model: model.state_dict(),
    "cast": lambda weight, model: model.to(torch.float64),
    "copy": lambda weight, model: copy.deepcopy(model),
    "pickle": lambda weight, model: pickle.dumps(weight),
    "hf names": lambda weight, model: dict(to_hf(model.config, model.named_parameters())),
}


def test_whatever_reads_or_writes_a_weight_that_is_away_raises(engine, tmp_path):
    engine.release_weights()
    model, weight = engine.model, engine.model.lm_head_weight
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((VOCAB, 32), torch.float32, "cpu")
    assert all(isinstance(absent, AbsentWeight) for absent in model.parameters())
    assert repr(weight) == f"AbsentWeight(({VOCAB}, 32), torch.float32, cpu)"
    for read in READS.values():
        with pytest.raises(RuntimeError, match=AWAY):
            read(weight, model)
    with pytest.raises(RuntimeError, match=AWAY):
        save_hf(model.named_parameters(), model.config, tmp_path / "saved")
    for call in (lambda: engine.generate(PROMPTS, PARAMS), lambda: engine.add_request([1], PARAMS)):
        with pytest.raises(RuntimeError, match=f"{AWAY}; update the weights before generating"):
            call()
    assert engine.step() == []


def test_the_memory_is_dropped_and_only_an_update_brings_the_weights_back(engine, tmp_path):
    before, other = samples(engine), random_model(tiny_config(), 3)
    stale = engine.model.embed_tokens.weight  # somebody kept it
    addresses = {name: weight.data_ptr() for name, weight in engine.model.named_parameters()}
    engine.weights_version = 7
    engine.release_weights()
    engine.release_weights()
    assert engine.weights.given_back.version == 7
    assert engine.weights.given_back.checksums == named_checksums(random_model(tiny_config(), 0))
    assert not stale.any(), "the pages are gone"
    engine.update_weights(other.named_parameters(), 8)
    assert {name: weight.data_ptr() for name, weight in engine.model.named_parameters()} == addresses
    assert named_checksums(engine.model) == named_checksums(other)
    assert engine.weights_version == 8
    assert samples(engine) == samples(Engine(model=other, max_model_len=64)) != before
    engine.release_kv_cache()
    engine.release_weights()
    engine.update_weights(random_model(tiny_config(), 0).named_parameters(), 9)
    engine.resume_kv_cache()
    assert samples(engine) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sync_brings_every_tensor_of_every_family(name, tmp_path):
    """Tied and untied heads, experts, fp32 routers and biases; the rotary table, which is not sent, has stayed."""
    tied = name == "qwen3-moe"
    config = ModelConfig.from_hf_dict(FAMILIES[name] | {"tie_word_embeddings": tied})
    engine = sleeper(saved(tmp_path / "model", config, seed=1), dtype="bfloat16")
    actor = Actor(random_model(config, 2), ActorConfig(dtype="bfloat16"))
    plain = Engine(tmp_path / "model", dtype="bfloat16", max_model_len=64)
    for one in (engine, plain):
        if one is engine:
            one.release_weights()
        sync_weights(actor, one, 1)
    assert not any(tensor.is_meta for tensor in (*engine.model.parameters(), *engine.model.buffers()))
    assert {(n, p.dtype, p.requires_grad) for n, p in engine.model.named_parameters()} == {
        (n, p.dtype, p.requires_grad) for n, p in plain.model.named_parameters()
    }
    assert named_checksums(engine.model) == named_checksums(plain.model)
    assert (engine.model.lm_head_weight is engine.model.embed_tokens.weight) == tied
    assert torch.equal(engine.model.cos_sin, plain.model.cos_sin)
    assert samples(engine) == samples(plain)


def test_an_engine_may_begin_without_having_read_a_weight(engine, tmp_path, monkeypatch):
    expected = samples(engine)
    monkeypatch.setattr(CheckpointReader, "tensor", lambda *_: pytest.fail("a weight is read"))
    late = sleeper(tmp_path / "model", read_weights=False)
    with pytest.raises(RuntimeError, match=f"{AWAY}; update the weights before generating"):
        late.generate(PROMPTS, PARAMS)
    with pytest.raises(RuntimeError, match=AWAY):
        named_checksums(late.model)
    late.release_weights()
    assert late.weights.given_back is None, "there was nothing"
    assert late.num_pages == engine.num_pages
    late.update_weights(engine.model.named_parameters(), 1)
    assert samples(late) == expected
    with pytest.raises(ValueError, match="read_weights=False needs enable_sleep_mode=True"):
        Engine(tmp_path / "model", read_weights=False)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        sleeper(tmp_path / "model", read_weights=False)


def test_an_update_that_fails_leaves_weights_that_nobody_can_read(engine):
    named = dict(random_model(tiny_config(), 3).named_parameters())
    engine.release_weights()
    given_back = engine.weights.given_back
    with pytest.raises(ValueError, match="missing"):
        engine.update_weights(list(named.items())[:-1], 4)
    for call in (lambda: engine.generate(PROMPTS, PARAMS), lambda: named_checksums(engine.model)):
        with pytest.raises(RuntimeError, match=AWAY):
            call()
    engine.release_weights()  # the memory had come back; what the engine had is what it had
    assert engine.weights.given_back == given_back
    assert engine.weights._memory.released
    engine.update_weights(named.items(), 5)
    assert engine.weights_version == 5


def test_memory_that_others_took_is_said_and_the_weights_stay_away(engine, monkeypatch):
    engine.release_weights()

    def no_memory(self):
        raise torch.OutOfMemoryError("1.00 GiB are needed")

    actor = Actor(random_model(tiny_config(), 3), ActorConfig())
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.weights._memory), "resume", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            sync_weights(actor, engine, 1)
        with pytest.raises(RuntimeError, match=AWAY):
            engine.generate(PROMPTS, PARAMS)
    sync_weights(actor, engine, 1)
    assert named_checksums(engine.model) == named_checksums(actor.model)


def test_nothing_is_allocated_between_the_end_of_the_memory_and_the_end_of_its_parameters(engine, monkeypatch):
    """What ran out of memory there would leave parameters that show addresses without memory."""

    def no_memory(*sizes, **more):
        raise torch.OutOfMemoryError

    drop = type(engine.weights._memory).release

    def dropping(memory):
        drop(memory)
        monkeypatch.setattr(torch, "empty", no_memory)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.weights._memory), "release", dropping)
        engine.release_weights()
    assert all(isinstance(weight, AbsentWeight) for weight in engine.model.parameters())


def test_who_cannot_give_weights_back_says_so(engine, tmp_path):
    with pytest.raises(ValueError, match="enable_sleep_mode=True needs model_path"):
        Engine(model=random_model(tiny_config(), 0), enable_sleep_mode=True)
    with pytest.raises(ValueError, match="enable_sleep_mode=1 must be True or False"):
        Engine(tmp_path / "model", enable_sleep_mode=1)
    plain = Engine(tmp_path / "model", max_model_len=64)
    with pytest.raises(RuntimeError, match="made without enable_sleep_mode=True"):
        plain.release_weights()
    assert len(samples(plain)) == 4
    engine.add_request([1, 2], PARAMS, "a")
    with pytest.raises(RuntimeError, match=r"release_weights\(\) with unfinished requests: finish them, or abort_all"):
        engine.release_weights()
    engine.abort_all()
    engine.release_weights()


def test_whoever_sends_from_elsewhere_gets_parameters_to_write(engine):
    """The channel of ranks apart asks for them as the sync of colocated ones does."""
    engine.release_weights()
    parameters = engine.parameters_to_update()
    assert set(parameters) == {name for name, _ in engine.model.named_parameters()}
    assert not any(isinstance(weight, AbsentWeight) or weight.any() for weight in parameters.values())


@pytest.mark.gpu
def test_graphs_captured_before_weights_went_away_give_the_bits_of_the_new_ones(tmp_path):
    """The memory is free meanwhile, others may use it, and the graphs find the new weights where they read the old."""
    config = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, head_dim=64, vocab_size=1024)
    path = saved(tmp_path / "model", config)
    options = {"dtype": "bfloat16", "device": "cuda", "max_model_len": 512, "max_num_seqs": 64, "num_pages": 128}
    engine, plain = (Engine(path, enable_sleep_mode=mode, **options) for mode in (True, False))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (3, 17, 90, 400)]
    assert sampled_by_graphs(engine, prompts) == sampled_by_graphs(plain, prompts)
    replays = dict(engine._runner.graphs._replays)
    size = sum(weight.nbytes for weight in engine.model.parameters())
    seen = set()
    for version, fill in ((1, 0xFF), (2, 0x7F), (3, 0x00)):
        actor = Actor(random_model(config, version, device="cuda"), ActorConfig(dtype="bfloat16"))
        addresses = [weight.data_ptr() for weight in engine.model.parameters()]
        engine.release_kv_cache()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        engine.release_weights()
        assert torch.cuda.mem_get_info()[0] - before >= 0.9 * size
        with pytest.raises(RuntimeError, match=AWAY):
            engine.model.logits(torch.ones(1, config.hidden_size, dtype=torch.bfloat16, device="cuda"))
        others = torch.full((torch.cuda.mem_get_info()[0] - (64 << 20),), fill, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match=r"for the rollout's weights, .*; set param_"):
            sync_weights(actor, engine, version)
        del others
        for one in (engine, plain):
            sync_weights(actor, one, version)
        engine.resume_kv_cache()
        assert [weight.data_ptr() for weight in engine.model.parameters()] == addresses
        assert named_checksums(engine.model) == named_checksums(plain.model)
        found = sampled_by_graphs(engine, prompts)
        assert found == sampled_by_graphs(plain, prompts)
        assert dict(engine._runner.graphs._replays) == replays
        seen.add(str(found))
        del actor
    assert len(seen) == 3, "every version samples otherwise"
    del engine, replays
    gc.collect()
