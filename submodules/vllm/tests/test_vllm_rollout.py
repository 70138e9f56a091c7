"""What comes out of vLLM is what our engine would have made, but for the last bits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_model
from vexact_vllm import weights
from vexact_vllm.settings import engine_arguments

from vexact.config import ConfigError, load_config
from vexact.models import ModelConfig, load_model
from vexact.models.tokenizer import read_tokenizer
from vexact.plugins import installed
from vexact.rollout import Engine, SamplingParams
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores
from vexact.weights import WeightSyncError

PROMPTS = [[5, 6, 7], [4, 5, 6, 7, 8, 9]]
BAND = {"float32": 1e-4, "bfloat16": 0.15}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def rollout(request, tiny, start):
    """(rollout, model with the trainer's weights)."""
    engine = start(tiny / "model", request.param)
    model = load_model(tiny / "model", dtype=getattr(torch, request.param), device="cpu")
    engine.take_weights(named(model), 1)
    yield engine, model
    engine.close()


def named(model):
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def trained(model, samples):
    """Per sample, the training forward's log-probabilities."""
    sequences = [TokenSequence(s.prompt_token_ids, s.token_ids, s.inv_temperature) for s in samples]
    with torch.no_grad():
        scores = token_scores(model, pack_tokens(sequences)).logprobs.numpy()
    return np.split(scores, np.cumsum([len(s.token_ids) for s in samples])[:-1])


def gap(model, samples):
    pairs = zip(trained(model, samples), samples, strict=True)
    return max(float(np.abs(ours - sample.logprobs).max()) for ours, sample in pairs)


def change(model, factor):
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(factor * noise.to(parameter.dtype))


def change_one_value(model):
    """By about one unit in the last place of bfloat16: no log-probability would tell."""
    with torch.no_grad():
        model.embed_tokens.weight[3, 5] *= 1 + 2**-7


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_temperature_that_was_sampled_with(rollout, temperature):
    engine, model = rollout
    samples = engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=12, temperature=temperature), ["a", "b"])
    assert [sample.request_id for sample in samples] == ["a/0", "a/1", "b/0", "b/1"]
    assert [sample.weights_version for sample in samples] == [engine.weights_version] * 4
    assert gap(model, samples) < BAND[str(model.lm_head_weight.dtype).removeprefix("torch.")]
    again = engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=12, temperature=temperature), ["a", "b"])
    assert [sample.token_ids for sample in again] == [sample.token_ids for sample in samples]


def test_endings_and_texts_are_our_engines(rollout, tiny):
    engine, model = rollout
    tokenizer = read_tokenizer(tiny / "model")
    ours = Engine(model=model, tokenizer=tokenizer)
    assert engine.eos_token_ids == ours.eos_token_ids
    asked = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    tokens = ours.generate(PROMPTS[:1], asked, ["x"])[0].token_ids
    text = tokenizer.decode([tokens[3]])
    for params in (
        SamplingParams(max_tokens=12, temperature=0.0),
        SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=[tokens[2]], ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.0, stop=[text], ignore_eos=True),
        asked,
    ):
        expected, found = ours.generate(PROMPTS[:1], params, ["x"])[0], engine.generate(PROMPTS[:1], params, ["x"])[0]
        facts = ("token_ids", "finish_reason", "stop_reason", "text", "prompt_token_ids", "temperature")
        assert [getattr(found, fact) for fact in facts] == [getattr(expected, fact) for fact in facts]
        assert found.logprobs.shape == found.min_logits.shape == (len(found.token_ids),)


def test_a_truncated_sample_says_that_its_threshold_is_unknown(rollout):
    engine, _ = rollout
    plain, cut = engine.generate(
        [PROMPTS[0]] * 2, [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, top_k=2)], ["p", "q"]
    )
    assert np.isneginf(plain.min_logits).all()
    assert np.isnan(cut.min_logits).all()


def test_new_weights_are_used_and_proved(rollout):
    engine, model = rollout
    change(model, 0.02)
    metrics = engine.take_weights(named(model), engine.weights_version + 1)
    assert set(metrics) == {"timing_s/weights_copy", "timing_s/weights_check"}
    samples = engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=12), ["a", "b"])
    assert gap(model, samples) < BAND[str(model.lm_head_weight.dtype).removeprefix("torch.")]


@pytest.mark.parametrize("update", [lambda model: change(model, 0.02), change_one_value])
def test_a_stale_tied_head_is_caught_however_small_the_update(rollout, monkeypatch, update):
    """vLLM's own fault, without the bridge's repair."""
    engine, model = rollout
    version = engine.weights_version
    update(model)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "repack_tied_head", lambda model: None)
        with pytest.raises(WeightSyncError, match="lm_head still computes with other weights than it was sent"):
            engine.take_weights(named(model), version + 1)
    with pytest.raises(RuntimeError, match="the last weight update failed"):
        engine.generate(PROMPTS, SamplingParams(), ["a", "b"])
    engine.take_weights(named(model), version + 1)
    assert engine.generate(PROMPTS, SamplingParams(max_tokens=2), ["a", "b"])[0].weights_version == version + 1


@pytest.mark.parametrize("part", ["embed_tokens", "qkv_proj", "gate_up_proj", "q_norm", "norm.weight", "down_proj"])
def test_one_tensor_that_stays_behind_is_caught(rollout, monkeypatch, part):
    engine, model = rollout
    chosen = [name for name, _ in model.named_parameters() if part in name][-1]
    before = dict(model.named_parameters())[chosen].detach().clone()
    change(model, 0.01)
    reload = weights.reload
    version = engine.weights_version

    def forgetful(llm, config, sent):
        reload(llm, config, [(name, before if name == chosen else tensor) for name, tensor in sent])

    with monkeypatch.context() as patch:
        patch.setattr(weights, "reload", forgetful)
        with pytest.raises(WeightSyncError, match="still computes with other weights"):
            engine.take_weights(named(model), version + 1)
    engine.take_weights(named(model), version + 1)


def test_an_untied_head_and_biases(tmp_path, start):
    path = write_model(
        tmp_path / "untied",
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_size=128,
        tie_word_embeddings=False,
    )
    engine = start(path, "float32")
    model = load_model(path, dtype=torch.float32, device="cpu")
    change(model, 0.02)
    engine.take_weights(named(model), 1)
    assert gap(model, engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=12), ["a", "b"])) < BAND["float32"]
    engine.close()


def test_a_layer_of_another_shape_is_named(tiny):
    """vLLM's Qwen2 derives the size of a head, whatever config.json says."""
    layer = torch.nn.Linear(4, 6, bias=False)
    layer.quant_method = SimpleNamespace(apply=lambda layer, x, bias: layer(x))
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"norm": layer})})
    with (
        torch.no_grad(),
        pytest.raises(WeightSyncError, match=r"norm has weights of shape \(4, 6\), .*\(4, 8\)"),
    ):
        weights.prove(model, ModelConfig.from_hf_dir(tiny / "model"), [("norm.weight", torch.ones(8, 4))], {})


@pytest.mark.parametrize(
    ("override", "expected"), [("gpu_memory_utilization=0.5", 15), ("kv_cache_bytes=1073741824", 1)]
)
def test_on_a_gpu_vllm_asks_for_what_the_actor_has_left(settings, monkeypatch, override, expected):
    """It would not start if the share of *all* memory that it is told were not free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 30, 80 << 30))
    config = load_config(settings(f"actor_rollout_ref.rollout.{override}"))
    arguments = engine_arguments(config, torch.device("cuda"))
    assert arguments["kv_cache_memory_bytes"] == expected << 30
    assert arguments["gpu_memory_utilization"] * 80 == expected
    assert arguments["enable_sleep_mode"]
    assert not arguments["enforce_eager"]


def test_what_vllm_does_not_have_is_refused_by_name(settings, tmp_path, start):
    assert list(installed("vexact.rollouts")) == ["vllm"]
    prefix = "actor_rollout_ref.rollout"
    refused = {
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "num_pages": 9,
        "page_size": 32,
        "batch_invariant": "false",
        "attn_impl": "sdpa",
        "temperature": 0.005,
        "val_kwargs.temperature": 0.005,
    }
    with pytest.raises(ConfigError) as caught:
        load_config(settings(*(f"{prefix}.{name}={value}" for name, value in refused.items())))
    assert all(f"{prefix}.{name}=" in str(caught.value) for name in refused)
    with pytest.raises(ConfigError, match=r"rollout_gpus=1 with .*name=vllm"):
        load_config(settings("trainer.rollout_gpus=1"))
    with pytest.raises(ConfigError, match=r"exactness=strict: .*name=vllm"):
        load_config(settings("trainer.exactness=strict"))
    with pytest.raises(ValueError, match="and the model's is 16"):
        start(write_model(tmp_path / "narrow", head_dim=16), "float32")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    names = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    with pytest.raises(ValueError, match="the model is a Qwen3MoeForCausalLM"):
        start(write_model(tmp_path / "experts", **names, **experts), "float32")
