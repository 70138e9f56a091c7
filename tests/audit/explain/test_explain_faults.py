"""Ten planted faults, one at a time: the finder names the operator or the stage."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

import vexact.ops as invariant
from vexact.audit.explain import explain, replay
from vexact.models import ModelConfig, random_model
from vexact.models.opset import set_ops
from vexact.ops import SamplingTensors, stock, token_logprobs
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.mismatch import apply_mismatch
from vexact.rollout.stepping import stepper
from vexact.training import Actor, ActorConfig
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores
from vexact.types import TrainSequence
from vexact.weights import sync_weights

VOCAB = 61
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "eos_token_id": VOCAB - 1,
}
PROMPT = tuple(np.random.default_rng(5).integers(0, VOCAB - 1, 70).tolist())  # crosses a key block of 64 and pages
PARAMS = SamplingParams(max_tokens=10, temperature=0.8, top_k=8, ignore_eos=True)


def build(**knobs):
    """An engine that runs ahead unless it is watched, and a trainer's model with the same weights."""
    model = random_model(ModelConfig.from_hf_dict(CONFIG), seed=3).requires_grad_(False)
    knobs = {"page_size": 4, "max_num_batched_tokens": 32, "seed": 1, "async_scheduling": True} | knobs
    return Engine(model=copy.deepcopy(model), **knobs), model


@pytest.fixture
def sides():
    return build()


def generate(engine, params=PARAMS, request_id="step1/0"):
    (sample,) = engine.generate([PROMPT], params, [request_id])
    return sample


def trained_logprobs(model, sample):
    sequence = TokenSequence(sample.prompt_token_ids, sample.token_ids, sample.inv_temperature, sample.min_logits)
    with torch.no_grad():
        return token_scores(model, pack_tokens([sequence])).logprobs.numpy()


def diagnose(engine, model, sample, **more):
    """The finder's answer for a sample whose recorded bits do differ."""
    assert (sample.logprobs.view(np.int32) != trained_logprobs(model, sample).view(np.int32)).any()
    more.setdefault("sampling_params", PARAMS)
    return explain(engine, model, sample, **more)


def plant(engine, **ops):
    set_ops(engine.model, dataclasses.replace(engine.model.ops, **ops))


def test_nothing_planted_nothing_found(sides):
    engine, model = sides
    found = explain(engine, model, generate(engine), sampling_params=PARAMS)
    assert not found.found
    assert "all 10 log-probabilities agree" in found.describe()
    assert type(engine.model.ops) is type(model.ops)
    assert engine.model.ops.linear is invariant.linear


def test_1_an_operator_replaced_by_a_stock_one(sides, tmp_path):
    engine, model = sides
    plant(engine, rms_norm=stock.rms_norm)
    found = diagnose(engine, model, generate(engine), out_path=tmp_path / "replay.pt")
    assert (found.stage, found.op, found.layer) == ("operator", "rms_norm", 0)
    assert found.where == "rms_norm of layers.0.input_norm"
    assert found.rollout.is_right is False
    assert found.trainer.is_right is True
    assert found.rollout.value != found.trainer.value
    assert found.ulp >= 1
    assert (found.rollout.path, found.trainer.path, found.rollout.shape) == ("chunk", "packed", (32, 32))
    again = replay(tmp_path / "replay.pt")
    assert (again.stage, again.where, again.position, again.element, again.rollout, again.trainer) == (
        found.stage,
        found.where,
        found.position,
        found.element,
        found.rollout,
        found.trainer,
    )
    assert "reproduced" in again.describe()


def norm_and_rope_with_fma(q, k, q_weight, k_weight, eps, positions, cos_sin):
    """first * cos - second * sin with the first product unrounded, as a contracting compiler makes it."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        low = (first.double() * cos.double() - (second * sin).double()).float()
        return torch.cat((low, second * cos + first * sin), dim=-1)

    return rotate(invariant.rms_norm(q, q_weight, eps)), rotate(invariant.rms_norm(k, k_weight, eps))


def test_2_a_multiply_add_spelled_differently(sides):
    engine, model = sides
    plant(engine, qk_norm_rope=norm_and_rope_with_fma)
    found = diagnose(engine, model, generate(engine))
    assert (found.stage, found.where, found.layer) == ("operator", "qk_norm_rope of layers.0.attention (query)", 0)
    assert found.position > 0, "position 0 is not rotated"


def attention_backwards_in_decode(q, k, v, metadata, scale, kv_cache=None, causal=True):
    """Online softmax over key blocks of 64, the last block first; prefill is as it should be."""
    out = invariant.attention(q, k, v, metadata, scale, kv_cache, causal)
    if metadata.max_seqlen_q > 1:
        return out
    num_keys = int(metadata.seqused_k[0])
    keys, values = (cache[metadata.block_table[0].long()].flatten(0, 1)[:num_keys] for cache in kv_cache)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))  # (K, Hq, D)
    top, total, mixed = torch.full((q.shape[1], 1), -torch.inf), torch.zeros(q.shape[1], 1), torch.zeros_like(q[0])
    for start in reversed(range(0, num_keys, 64)):
        scores = torch.einsum("hd,khd->hk", q[0], keys[start : start + 64]) * scale
        new_top = torch.maximum(top, scores.amax(1, keepdim=True))
        weights, shrink = torch.exp(scores - new_top), torch.exp(top - new_top)
        total = total * shrink + weights.sum(1, keepdim=True)
        mixed = mixed * shrink + torch.einsum("hk,khd->hd", weights, values[start : start + 64])
        top = new_top
    return (mixed / total).unsqueeze(0)


def test_3_key_blocks_reversed_in_decode_only(sides):
    engine, model = sides
    plant(engine, attention=attention_backwards_in_decode)
    found = diagnose(engine, model, generate(engine))
    assert (found.stage, found.where, found.layer) == ("operator", "attention of layers.0.attention", 0)
    assert found.rollout.path == "decode"
    assert found.position >= len(PROMPT)
    assert found.response_position == found.position - len(PROMPT) + 1
    assert (found.rollout.is_right, found.trainer.is_right) == (False, True)


def test_4_a_wrong_softmax_scale(sides):
    engine, model = sides

    def scaled(q, k, v, metadata, scale, *rest):
        return invariant.attention(q, k, v, metadata, scale * 1.001, *rest)

    plant(engine, attention=scaled)
    found = diagnose(engine, model, generate(engine))
    assert (found.stage, found.op, found.layer, found.rollout.is_right) == ("operator", "attention", 0, False)


def test_4b_a_scale_passed_to_one_layer_is_named(sides):
    engine, model = sides
    layer_ops = engine.model.layers[1].attention.ops
    engine.model.layers[1].attention.ops = dataclasses.replace(
        layer_ops,
        attention=lambda q, k, v, metadata, scale, *rest: layer_ops.attention(q, k, v, metadata, 0.4, *rest),
    )
    found = diagnose(engine, model, generate(engine))
    assert (found.op, found.layer) == ("attention", 1)


def test_5_a_stale_kv_page(sides, monkeypatch):
    engine, model = sides
    generate(engine)
    for parameter in model.parameters():
        parameter.mul_(1.01)
    with monkeypatch.context() as patch:
        patch.setattr(engine._blocks, "clear_cache", lambda: None)
        engine.update_weights(model.named_parameters(), version=1)
    sample = generate(engine)
    found = diagnose(engine, model, sample)
    assert found.stage == "kv page"
    assert "stale KV page: cached page" in found.summary
    assert (found.layer, found.position, found.where.split(",")[0]) == (0, 0, "key cache")


def test_5b_a_page_that_is_not_written():
    engine, model = build(enable_prefix_caching=False)

    def forgets_to_write(q, k, v, metadata, scale, kv_cache, *rest):
        slots = torch.where(metadata.seqused_k[0] == len(PROMPT) + 2, -1, metadata.slot_mapping)
        return invariant.attention(q, k, v, dataclasses.replace(metadata, slot_mapping=slots), scale, kv_cache, *rest)

    plant(engine, attention=forgets_to_write)
    found = diagnose(engine, model, generate(engine))
    assert (found.stage, found.op, found.layer) == ("kv page", "attention", 0)
    assert f"position {len(PROMPT) + 1} reads back" in found.summary


def test_6_an_off_by_one_position(sides, monkeypatch):
    engine, model = sides
    unshifted = stepper.build_batch

    def late(*args):
        batch = unshifted(*args)
        return dataclasses.replace(batch, positions=batch.positions + (batch.max_seqlen_q == 1))

    monkeypatch.setattr(stepper, "build_batch", late)
    found = diagnose(engine, model, generate(engine))
    assert (found.stage, found.where, found.position) == ("inputs", "position", len(PROMPT))
    assert (found.rollout.value, found.trainer.value, found.rollout.path) == (len(PROMPT) + 1, len(PROMPT), "decode")
    assert "off by +1" in found.summary


def test_7_logits_rounded_to_bf16(sides):
    engine, model = sides
    compute = engine.model.logits
    engine.model.logits = lambda hidden: compute(hidden).bfloat16().float()
    found = diagnose(engine, model, generate(engine))
    assert (found.stage, found.position) == ("logits", len(PROMPT) - 1)
    assert "rounded to bf16" in found.summary


def test_7b_a_head_that_rounds_to_bf16(sides, tmp_path):
    engine, model = sides
    apply_mismatch(engine.model, "bf16_logits", 1.0)
    found = diagnose(engine, model, generate(engine), out_path=tmp_path / "replay.pt")
    assert (found.stage, found.where) == ("logits", "linear of lm_head")
    assert "rounds its logits to bf16" in found.summary


def test_8_a_weight_bucket_that_is_not_synced(sides, tmp_path):
    engine, model = sides
    name = "layers.1.mlp.gate_up_proj.weight"
    for parameter in model.parameters():
        parameter.mul_(1.01)
    held = dict(engine.model.named_parameters())[name].detach().clone()
    engine.update_weights([(n, held if n == name else p.detach()) for n, p in model.named_parameters()], version=1)
    found = diagnose(engine, model, generate(engine), out_path=tmp_path / "replay.pt")
    assert (found.stage, found.summary) == ("weights", f"tensor {name} not synced")
    assert found.rollout.value == float(held[0, 0])
    assert found.trainer.value == float(dict(model.named_parameters())[name][0, 0])
    again = replay(tmp_path / "replay.pt")
    assert (again.summary, again.rollout, again.trainer) == (found.summary, found.rollout, found.trainer)


def wrong_temperature(engine):
    prepare = engine._runner.prepare

    def hotter(batch):
        return prepare(dataclasses.replace(batch, temperature=batch.temperature * np.float32(1.25)))

    return hotter


def test_9_a_wrong_temperature(sides, monkeypatch):
    engine, model = sides
    monkeypatch.setattr(engine._runner, "prepare", wrong_temperature(engine))
    found = diagnose(engine, model, generate(engine))
    assert found.stage == "temperature"
    assert (found.rollout.value, found.trainer.value) == (1.0, pytest.approx(0.8))


@pytest.mark.parametrize(("factor", "says"), [(1.25, "temperature 1"), (1.5, "those of temperature 1.2,")])
def test_9b_a_temperature_that_was_wrong_at_generation_time(sides, factor, says):
    engine, model = sides
    hot = dataclasses.replace(PARAMS, temperature=0.8 * factor, top_k=-1)
    sample = dataclasses.replace(generate(engine, hot), temperature=0.8)
    found = diagnose(engine, model, sample, sampling_params=None)
    assert found.stage == "temperature"
    assert says in found.summary


def not_renormalised(logits: torch.Tensor, params: SamplingTensors):
    """Draws from the kept set, reports the log-probability of the full softmax."""
    drawn = invariant.sample(logits, params)
    keep_all = torch.full_like(drawn.min_logit, -torch.inf)
    full = token_logprobs(logits, drawn.token_ids, 1.0 / params.temperature, keep_all)
    return drawn._replace(logprobs=full.logprobs)


@pytest.mark.parametrize("still_there", [True, False])
def test_10_truncated_but_not_renormalised(sides, monkeypatch, still_there):
    engine, model = sides
    with monkeypatch.context() as patch:
        patch.setattr("vexact.rollout.sampling.sampler.sample", not_renormalised)
        sample = generate(engine)
        if still_there:
            found = diagnose(engine, model, sample)
    if not still_there:
        found = diagnose(engine, model, sample, sampling_params=None)
    assert found.stage == "truncation"
    assert "renormalis" in found.summary


def test_10b_a_threshold_that_is_not_recorded(sides, monkeypatch):
    engine, model = sides
    monkeypatch.setattr(
        "vexact.rollout.sampling.sampler.sample",
        lambda logits, params: invariant.sample(logits, params)._replace(
            min_logit=torch.full_like(params.temperature, -torch.inf)
        ),
    )
    found = diagnose(engine, model, generate(engine))
    assert found.stage == "truncation"
    assert "min_logit" in found.summary


def test_10c_one_more_token_kept_is_no_matter_of_temperature(sides, monkeypatch):
    """At temperature 1 nothing can have ignored it."""
    params = SamplingParams(max_tokens=12, top_k=5, ignore_eos=True)

    def one_more(logits, given):
        return invariant.sample(logits, given._replace(top_k=given.top_k + 1))

    monkeypatch.setattr("vexact.rollout.sampling.sampler.sample", one_more)
    found = explain(*sides, generate(sides[0], params), sampling_params=params)
    assert found.stage == "truncation"
    assert "another min_logit than its parameters give" in found.summary


def test_a_difference_that_is_gone_is_said_to_be_of_generation_time():
    engine, model = build(enable_prefix_caching=False)
    clean = engine.model.ops
    plant(engine, rms_norm=stock.rms_norm)
    sample = generate(engine)
    set_ops(engine.model, clean)
    found = diagnose(engine, model, sample)
    assert found.stage == "generation state"
    assert "the replay agrees with the trainer" in found.summary


def test_an_actor_with_shards_is_diagnosed_in_its_update_and_goes_on():
    """Sharded fp32 weights that compute in bf16, as in training."""
    config = ModelConfig.from_hf_dict(CONFIG)
    actor = Actor(random_model(config, seed=3), ActorConfig(dtype="bfloat16", enable_gradient_checkpointing=True))
    engine = Engine(model=random_model(config, seed=4, dtype=torch.bfloat16), page_size=4)
    found = []
    for version in range(3):
        sync_weights(actor, engine, version)
        if version == 2:
            plant(engine, linear=stock.linear)
        sample = generate(engine)
        sequence = TrainSequence(sample, np.ones(len(sample.token_ids), np.float32))
        actor.update([sequence], lambda *_: found.append(explain(engine, actor, sample, sampling_params=PARAMS)))  # noqa: B023
    assert [one.found for one in found] == [False, False, True]
    assert found[2].op == "linear"
