"""The loss and the bias that balance experts: against a reference, over any packing, refused where there are none."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from moe_configs import DEEPSEEK_V3, FAMILIES, MIXTRAL, MOONLIGHT, QWEN3_MOE
from training_support import gradients_of_update, random_sequences, tiny_model

from vexact.models import ModelConfig, random_model
from vexact.models.layers import MoE
from vexact.ops.moe.balance import balance_loss_reference, sequence_loads, with_balance_loss
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.training.passes.experts import check_experts, load_metrics

RATE = 0.01
DENSE = MOONLIGHT | {"first_k_dense_replace": 3}  # of 3 layers


def actor_of(raw, seed=0, **config):
    config = {"optim": OptimConfig(lr=1e-2), "grad_clip": math.inf} | config
    return Actor(random_model(ModelConfig.from_hf_dict(raw), seed), ActorConfig(**config))


def routers(actor):
    return [module.router for module in actor.model.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_experts", [8, 5])
def test_the_gradient_is_that_of_the_reference(scoring, num_experts):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, num_experts, generator=generator, requires_grad=True)
    sequence = torch.randint(0, 4, (23,), generator=generator)  # 3 of 3 sequences belong to none
    experts = logits.detach().topk(2, dim=1).indices.sort(1).values.int()
    counts = sequence_loads(experts, sequence, 3, num_experts)
    lengths = torch.bincount(sequence, minlength=4)[:3]
    assert counts.sum(1).tolist() == (2 * lengths).tolist()
    loads = torch.cat([counts * num_experts / (2 * lengths.unsqueeze(1)), torch.zeros(1, num_experts)])
    shares = torch.cat([0.5 / lengths, torch.zeros(1)])
    weights = torch.rand(23, 2, generator=generator, requires_grad=True)
    out, values = with_balance_loss(weights, logits, loads, shares, sequence, scoring, 0.7)
    assert torch.equal(out, weights)
    out.sum().backward()
    assert torch.equal(weights.grad, torch.ones_like(weights))
    wide = logits.detach().double().requires_grad_()
    loss = balance_loss_reference(wide, experts, loads, shares, sequence, scoring)
    (0.7 * loss).backward()
    assert values.double().sum().item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-8)
    assert not logits.grad[sequence == 3].any()


def test_a_balanced_sequence_has_loss_one():
    experts = torch.arange(8).view(4, 2).int()
    sequence = torch.zeros(4, dtype=torch.int64)
    loads = sequence_loads(experts, sequence, 1, 8) * 8 / (2 * 4)
    shares = torch.tensor([1 / 4, 0.0])
    padded = torch.cat([loads, torch.zeros(1, 8)])
    _, values = with_balance_loss(torch.ones(4, 2), torch.zeros(4, 8), padded, shares, sequence, "softmax", 1.0)
    assert values.sum() == 1


@pytest.mark.parametrize("raw", [QWEN3_MOE, DEEPSEEK_V3], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("one_pass", [True, False])
def test_no_packing_changes_the_loss(raw, one_pass):
    """Whole, cut up, alone, recomputed: one loss, and one gradient up to the order of its additions."""
    sequences = random_sequences(12)
    entropy = {} if one_pass else {"entropy_coeff": 0.01}
    variants = [
        {"ppo_max_token_len_per_gpu": 4096},
        {"ppo_max_token_len_per_gpu": 16},
        {"ppo_max_token_len_per_gpu": 40, "balance_micro_batches": False},
        {"ppo_max_token_len_per_gpu": 4096, "enable_gradient_checkpointing": True},
    ]
    found = []
    for variant in variants:
        actor = actor_of(raw, router_aux_loss_coef=0.5, **entropy, **variant)
        assert actor.one_pass is one_pass
        found.append(gradients_of_update(actor, sequences))
    (metrics, gradients), *others = found
    without, plain = gradients_of_update(actor_of(raw, **entropy), sequences)
    layers = len(actor.model.config.moe.layers)
    assert "actor/router_aux_loss" not in without
    assert metrics["actor/router_aux_loss"] > 1
    assert metrics["actor/loss"] == pytest.approx(
        without["actor/loss"] + 0.5 * layers * metrics["actor/router_aux_loss"], rel=1e-6
    )
    name = f"layers.{actor.model.config.num_layers - 1}.mlp.router.weight"
    assert not torch.allclose(gradients[name], plain[name], rtol=1e-2)
    for theirs, values in others:
        assert theirs["actor/router_aux_loss"] == pytest.approx(metrics["actor/router_aux_loss"], rel=1e-6)
        assert theirs["actor/moe_load_max_over_mean"] == metrics["actor/moe_load_max_over_mean"]
        for key, gradient in gradients.items():
            torch.testing.assert_close(values[key], gradient, rtol=2e-4, atol=2e-5)
    recomputed = others[-1][1]
    assert all(torch.equal(recomputed[key], gradient) for key, gradient in gradients.items())


def test_the_loss_evens_out_the_load():
    worst = {}
    for coefficient in (0.0, 1.0):
        actor = actor_of(QWEN3_MOE, router_aux_loss_coef=coefficient)
        for step in range(12):
            metrics = actor.update(random_sequences(24, seed=step % 2))
        worst[coefficient] = metrics["actor/moe_load_max_over_mean"]
    assert worst[1.0] < worst[0.0] - 0.1


def test_the_bias_moves_by_the_rate_towards_the_mean_load():
    """Counted over a whole mini-batch, whatever its micro-batches."""
    sequences, biases = random_sequences(12), []
    for budget in (4096, 16):
        actor = actor_of(MOONLIGHT, router_bias_update_rate=RATE, ppo_max_token_len_per_gpu=budget)
        chosen = {router.layer: [] for router in routers(actor)}

        def note(module, _inputs, outputs, chosen=chosen):
            routes, _ = outputs
            chosen[module.layer].append(routes.experts.flatten())

        for router in routers(actor):
            router.register_forward_hook(note)
        actor.update(sequences)
        for router in routers(actor):
            load = torch.bincount(torch.cat(chosen[router.layer]), minlength=8)
            expected = RATE * torch.sign(load.double().mean() - load).float()
            assert len(set(expected.tolist())) > 1
            assert torch.equal(router.bias, expected)
        biases.append([router.bias.clone() for router in routers(actor)])
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))


def test_the_bias_evens_out_the_load_and_gets_no_gradient():
    worst = []
    for rate in (0.0, 0.05):
        actor = actor_of(MOONLIGHT, router_bias_update_rate=rate, optim=OptimConfig(lr=0.0))
        for _ in range(12):
            metrics = actor.update(random_sequences(24))
            assert all(router.bias.grad is None and not router.bias.requires_grad for router in routers(actor))
        worst.append(metrics["actor/moe_load_max_over_mean"])
    assert worst[1] < worst[0] - 0.2


def test_a_skipped_step_leaves_the_bias_alone():
    actor = actor_of(MOONLIGHT, router_bias_update_rate=RATE)
    actor.optimizer.step = lambda max_norm: math.nan
    assert actor.update(random_sequences(6))["actor/skipped_steps"] == 1
    assert not any(router.bias.any() for router in routers(actor))


def test_the_bias_stays_fp32_where_the_forward_is_bf16():
    """Sharded for a second dtype, alone: a bias that bf16 cannot hold decides between two equal experts."""
    logprobs = []
    for value in (0.0, 1e-6):
        actor = actor_of(MOONLIGHT, dtype="bfloat16")
        with torch.no_grad():
            for router in routers(actor):
                router.weight.zero_()
                router.bias.to_local()[-1] = 1.0 + value  # bf16 would round it to 1
                router.bias.to_local()[:4] = 1.0
        rescored = actor.rescore(random_sequences(3))
        logprobs.append(np.concatenate(rescored.routes))
        assert dict(actor.named_weights())["layers.1.mlp.router.bias"].dtype == torch.float32
    assert (logprobs[0] != logprobs[1]).all()


def test_loads_by_hand():
    loads = torch.tensor([[4, 0, 0, 0], [1, 1, 1, 1]])
    assert load_metrics(loads) == {"moe_load_max_over_mean": 2.5, "moe_idle_experts": 0.375}


def test_a_dense_model_reports_nothing_of_experts():
    metrics = Actor(tiny_model(), ActorConfig()).update(random_sequences(4))
    assert not [name for name in metrics if "moe" in name or "router" in name]


@pytest.mark.parametrize(
    ("raw", "config", "message"),
    [
        (None, {"router_aux_loss_coef": 0.1}, r"router_aux_loss_coef=0.1: Qwen3ForCausalLM has no experts to balance"),
        (None, {"router_bias_update_rate": 0.1}, r"router_bias_update_rate=0.1: Qwen3ForCausalLM has no experts"),
        (DENSE, {"router_aux_loss_coef": 0.1}, r"coef=0.1: DeepseekV3ForCausalLM with this config.json has no experts"),
        (DENSE, {"router_bias_update_rate": 0.1}, r"DeepseekV3ForCausalLM with this config.json has no experts"),
        (MIXTRAL, {"router_bias_update_rate": 0.1}, r"MixtralForCausalLM has no bias.*set it to 0 and use actor_roll"),
        (
            QWEN3_MOE | {"output_router_logits": True, "router_aux_loss_coef": "much"},
            {"router_aux_loss_coef": None},
            r"config.json: router_aux_loss_coef='much' is no coefficient",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused(raw, config, message):
    model = tiny_model().config if raw is None else ModelConfig.from_hf_dict(raw)
    with pytest.raises(ValueError, match=message):
        check_experts(ActorConfig(**config), model)


@pytest.mark.parametrize(
    ("raw", "coefficient"),
    [
        (QWEN3_MOE | {"router_aux_loss_coef": 0.002}, 0.0),
        (QWEN3_MOE | {"router_aux_loss_coef": 0.002, "output_router_logits": True}, 0.002),
        (MOONLIGHT | {"aux_loss_alpha": 0.003, "seq_aux": True}, 0.003),
        (MOONLIGHT, 0.0),
        (None, 0.0),
    ],
)
def test_null_takes_what_config_json_asks_for(raw, coefficient):
    model = tiny_model().config if raw is None else ModelConfig.from_hf_dict(raw)
    assert check_experts(ActorConfig(router_aux_loss_coef=None), model) == coefficient
    assert check_experts(ActorConfig(), model) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_counts_its_tokens(family):
    actor = actor_of(FAMILIES[family], router_aux_loss_coef=0.1)
    found = {}

    def watch(loads, _original=load_metrics):
        found["loads"] = loads
        return _original(loads)

    sequences = random_sequences(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vexact.training.actor.load_metrics", watch)
        metrics = actor.update([dataclasses.replace(s) for s in sequences])
    moe = actor.model.config.moe
    tokens = sum(s.sample.num_tokens - 1 for s in sequences)
    assert found["loads"].shape == (len(moe.layers), moe.num_experts)
    assert (found["loads"].sum(1) == tokens * moe.top_k).all()
    assert metrics["actor/moe_load_max_over_mean"] >= 1
    assert metrics["actor/router_aux_loss"] >= 0.99
