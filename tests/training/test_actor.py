"""The actor: what must change a result, what must not, and what stops an update."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_support import (
    assert_same_bits,
    gradients_of_update,
    random_sequences,
    tiny_actor,
    tiny_model,
    weights_of,
)

from vexact.training import ActorConfig, OptimConfig, Reference


@pytest.mark.parametrize("loss", [{}, {"loss_mode": "gspo"}, {"loss_agg_mode": "seq-mean-token-mean"}])
def test_micro_batch_size_and_order_do_not_change_the_gradient(loss):
    sequences = random_sequences(12)
    results = []
    for budget, balance in ((1000, True), (15, True), (40, False)):
        actor = tiny_actor(ppo_max_token_len_per_gpu=budget, balance_micro_batches=balance, grad_clip=math.inf, **loss)
        results.append(gradients_of_update(actor, sequences))
    (metrics, gradients), *others = results
    for other_metrics, other_gradients in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "applies"),
    [
        ({"loss_agg_mode": "seq-mean-token-mean"}, True),
        ({"use_kl_loss": True, "kl_loss_coef": 0.5}, True),
        ({"loss_mode": "reinforce", "fsdp": True}, True),
        ({"loss_mode": "gspo"}, False),
        ({"entropy_coeff": 0.01}, False),
    ],
)
def test_the_head_is_trained_in_one_pass_where_the_loss_is_elementwise(config, applies, monkeypatch):
    sequences = random_sequences(12, ref_logprobs=True)
    config = {"ppo_max_token_len_per_gpu": 40, "grad_clip": math.inf, **config}
    actor = tiny_actor(**config)
    assert actor.one_pass is applies
    metrics, gradients = gradients_of_update(actor, sequences)
    monkeypatch.setattr("vexact.training.passes.one_pass.MAX_ACCUMULATOR_BYTES", 0)
    general = tiny_actor(**config)
    assert not general.one_pass
    general_metrics, general_gradients = gradients_of_update(general, sequences)
    assert general_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradients, general_gradients, rtol=1e-4, atol=1e-6)


def test_metrics_have_verls_names_and_on_policy_values_are_exactly_zero():
    actor = tiny_actor(use_kl_loss=True, entropy_coeff=0.01, ppo_max_token_len_per_gpu=30)
    reference = Reference(tiny_model(), actor.config)
    sequences = random_sequences(6)
    on_policy = [
        replace(s, sample=replace(s.sample, logprobs=own), ref_logprobs=ref)
        for s, own, ref in zip(sequences, actor.logprobs(sequences), reference.logprobs(sequences), strict=True)
    ]
    metrics = actor.update(on_policy)
    for name in ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "kl_loss", "skipped_steps"):
        assert metrics[f"actor/{name}"] == 0.0, name
    assert metrics["actor/kl_coef"] == 0.001
    assert metrics["actor/lr"] == 1e-2
    assert 0 < metrics["actor/entropy"] < math.log(53)
    assert metrics["actor/entropy_loss"] == pytest.approx(metrics["actor/entropy"], rel=1e-6)
    expected = metrics["actor/pg_loss"] - 0.01 * metrics["actor/entropy_loss"]
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["actor/grad_norm"] > 0


def test_audit_sees_the_first_mini_batch_in_its_order_before_weights_change():
    actor = tiny_actor(ppo_mini_batch_size=5, ppo_max_token_len_per_gpu=20, shuffle=True, ppo_epochs=2)
    sequences = random_sequences(11)
    before, calls = actor.logprobs(sequences), []
    actor.update(sequences, lambda indices, logprobs, _: calls.append((indices, logprobs)))
    assert len(calls) == 1
    indices, logprobs = calls[0]
    assert len(indices) == 5
    assert indices != sorted(indices)
    for index, training in zip(indices, logprobs, strict=True):
        assert training.dtype == np.float32
        assert training.tobytes() == before[index].tobytes()


def test_what_the_audit_raises_leaves_weights_and_counters_untouched():
    class Mismatch(Exception):
        pass

    def audit(indices, logprobs, routes):
        raise Mismatch

    actor, untouched, sequences = tiny_actor(), tiny_actor(), random_sequences(4)
    before = weights_of(actor)
    with pytest.raises(Mismatch):
        actor.update(sequences, audit)
    assert_same_bits(weights_of(actor), before)
    assert actor.update(sequences) == untouched.update(sequences)
    assert_same_bits(weights_of(actor), weights_of(untouched))


def test_gradient_checkpointing_changes_no_bit():
    sequences = random_sequences(6)
    plain = tiny_actor()
    others = [tiny_actor(enable_gradient_checkpointing=True, recompute_num_layers=n) for n in (None, 0, 1)]
    assert [actor.model.recomputed_layers for actor in (plain, *others)] == [0, len(plain.model.layers), 0, 1]
    for _ in range(2):
        metrics = plain.update(sequences)
        assert all(actor.update(sequences) == metrics for actor in others)
    for actor in others:
        assert_same_bits(weights_of(plain), weights_of(actor))


def test_no_more_layers_are_recomputed_than_there_are():
    for number in (-1, 3):
        with pytest.raises(
            ValueError, match=rf"recompute_num_layers={number}, but the model has 2 layers; set a number"
        ):
            tiny_actor(enable_gradient_checkpointing=True, recompute_num_layers=number)


def test_sharding_over_one_rank_changes_no_bit():
    sequences = random_sequences(6)
    plain, sharded = tiny_actor(), tiny_actor(fsdp=True, enable_gradient_checkpointing=True)
    for _ in range(2):
        assert plain.update(sequences) == sharded.update(sequences)
    assert_same_bits(weights_of(plain), weights_of(sharded))


def test_bfloat16_compute_keeps_a_float32_master_copy():
    actor = tiny_actor(dtype="bfloat16", lr=1e-4)
    rounded = tiny_model(dtype=torch.bfloat16)
    pure = Reference(rounded, ActorConfig(dtype="bfloat16"))
    sequences = random_sequences(4)
    for ours, theirs in zip(actor.logprobs(sequences), pure.logprobs(sequences), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    actor.update(sequences)
    assert all(parameter.dtype == torch.float32 for parameter in actor.model.parameters())
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in actor.named_weights())
    moved = [
        (a.full_tensor() - b).abs().max().item() for a, b in zip(actor.model.parameters(), tiny_model().parameters())
    ]
    assert 0 < max(moved) < 3e-4  # AdamW moves every weight by about lr; in bf16 most of that would be rounded away


@pytest.mark.parametrize("fsdp", [None, True])
def test_resume_is_bit_identical(fsdp):
    config = {
        "fsdp": fsdp,
        "shuffle": True,
        "ppo_mini_batch_size": 4,
        "optim": OptimConfig(lr=1e-2, lr_scheduler_type="cosine", lr_warmup_steps=2, total_training_steps=5),
    }
    batches = [random_sequences(8, seed=seed) for seed in range(4)]
    straight = tiny_actor(**config)
    for batch in batches[:2]:
        straight.update(batch)
    state = straight.state_dict()
    expected = [straight.update(batch) for batch in batches[2:]]
    resumed = tiny_actor(seed=99, **config)
    resumed.update(batches[3])
    resumed.load_state_dict(state)
    assert [resumed.update(batch) for batch in batches[2:]] == expected
    assert_same_bits(weights_of(resumed), weights_of(straight))


@pytest.mark.parametrize("config", [{}, {"fsdp": True}, {"dtype": "bfloat16"}])
def test_a_forward_without_a_backward_leaves_weights_and_moments_in_their_place(config):
    first, second = random_sequences(4), random_sequences(4, seed=1)
    straight, resumed = tiny_actor(**config), tiny_actor(seed=99, **config)
    straight.update(first)
    straight.logprobs(first)
    state = straight.state_dict()
    resumed.logprobs(first)
    resumed.load_state_dict(state)
    for ours, theirs in zip(resumed.logprobs(second), straight.logprobs(second), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert state["parameters"]["embed_tokens.weight"]["exp_avg"].any()
    assert all(saved["weight"].dtype == torch.float32 for saved in state["parameters"].values())
    assert resumed.update(second) == straight.update(second)
    assert_same_bits(weights_of(resumed), weights_of(straight))


def test_a_state_taken_before_the_first_step_restores_an_empty_optimizer():
    straight, resumed = tiny_actor(), tiny_actor(seed=99)
    resumed.update(random_sequences(4, seed=5))
    resumed.load_state_dict(straight.state_dict())
    sequences = random_sequences(4)
    assert resumed.update(sequences) == straight.update(sequences)
    assert_same_bits(weights_of(resumed), weights_of(straight))


def test_a_state_of_another_model_is_refused():
    state = tiny_actor().state_dict()
    del state["parameters"]["norm.weight"]
    with pytest.raises(ValueError, match=r"missing norm\.weight; unexpected nothing"):
        tiny_actor().load_state_dict(state)


def test_bad_sequences_are_named():
    actor, (first, *_) = tiny_actor(use_kl_loss=True, ppo_max_token_len_per_gpu=3), random_sequences(2)
    with pytest.raises(ValueError, match=r"use_kl_loss=True, but request-0 has no ref_logprobs"):
        actor.update([first])
    long = random_sequences(1, seed=3, ref_logprobs=True)
    with pytest.raises(ValueError, match=r"request-0 has \d+ tokens, more than .*ppo_max_token_len_per_gpu=3"):
        actor.update(long)
    with pytest.raises(ValueError, match=r"request-0 has \d+ response tokens but 1 advantages"):
        actor.update([replace(long[0], advantages=np.zeros(1, np.float32))])
    with pytest.raises(ValueError, match="no sequences"):
        actor.update([])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"loss_agg_mode": "seq-mean-token-sum-norm"},
            "set it to a positive constant such as data.max_response_length",
        ),
        ({"kl_loss_type": "full"}, "unknown actor.kl_loss_type 'full'"),
        ({"dtype": "fp8"}, "unknown actor.dtype 'fp8'"),
        ({"grad_clip": 0.0}, "actor.grad_clip must be positive"),
        ({"ppo_epochs": 0}, "actor.ppo_epochs must be at least 1, got 0"),
        ({"fsdp": False, "dtype": "bfloat16"}, "actor.fsdp=False needs one rank and a model in torch.bfloat16"),
    ],
)
def test_bad_configuration_is_refused_with_the_key(config, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        tiny_actor(**config)


def test_gspo_fixes_the_aggregation_and_says_so(caplog):
    actor = tiny_actor(loss_mode="gspo", loss_agg_mode="token-mean")
    assert actor.config.agg_mode == "seq-mean-token-mean"
    assert "actor.loss_agg_mode=token-mean is not used: gspo aggregates by seq-mean-token-mean" in caplog.text


def test_learning_rate_schedules():
    constant = OptimConfig(lr=2.0, lr_warmup_steps=4)
    assert [constant.lr_at(step) for step in (0, 1, 3, 4, 100)] == [0.0, 0.5, 1.5, 2.0, 2.0]
    cosine = OptimConfig(
        lr=1.0, lr_scheduler_type="cosine", lr_warmup_steps_ratio=0.2, total_training_steps=10, min_lr_ratio=0.1
    )
    # Warm-up from 0.1 over 2 steps; half way through the 8 remaining steps cos is 0: 0.1 + 0.9 / 2.
    assert [cosine.lr_at(step) for step in (0, 1, 2, 6, 10, 50)] == pytest.approx([0.1, 0.55, 1.0, 0.55, 0.1, 0.1])
    linear = OptimConfig(lr=1.0, lr_scheduler_type="linear", total_training_steps=4)
    assert [linear.lr_at(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match=r"actor\.optim\.total_training_steps is -1.*'cosine'"):
        OptimConfig(lr_scheduler_type="cosine")
