"""Only numbers reach an optimizer step; a step that would not be one is skipped, counted and explained."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_support import assert_same_bits, random_sequences, tiny_actor, tiny_model, weights_of

from vexact.models import NonFiniteError
from vexact.training import OptimConfig, SupervisedConfig, nonfinite_in, supervised_steps
from vexact.training import actor as actor_module

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["advantages", "ref_logprobs", "logprobs"], [NAN, INF, -INF]),
        ("min_logits", NAN),
        ("min_logits", INF),  # -inf keeps every token
    ],
)
def test_an_input_that_is_no_number_is_named(name, value):
    first, second, *rest = random_sequences(4, ref_logprobs=True)
    holder = second if name in ("advantages", "ref_logprobs") else second.sample
    values = getattr(holder, name).copy()
    values[1] = value
    changed = (
        replace(second, **{name: values})
        if holder is second
        else replace(second, sample=replace(second.sample, **{name: values}))
    )
    actor = tiny_actor(use_kl_loss=True)
    before = weights_of(actor)
    with pytest.raises(ValueError, match=rf"request-1: {name}\[1\] is -?(nan|inf); only finite numbers"):
        actor.update([first, changed, *rest])
    assert_same_bits(weights_of(actor), before)


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.01])
def test_a_threshold_above_every_logit_of_later_weights_skips_no_step(entropy_coeff):
    """One token was kept when it was sampled, and its logit has fallen since: in later mini-batches, in a reference."""
    sequences = [
        replace(s, sample=replace(s.sample, min_logits=np.full(len(s.sample.token_ids), 50.0, np.float32)))
        for s in random_sequences(6, ref_logprobs=True)
    ]
    actor = tiny_actor(use_kl_loss=True, entropy_coeff=entropy_coeff, ppo_mini_batch_size=2)
    metrics = actor.update(sequences)
    assert metrics["actor/skipped_steps"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert all(not logprobs.any() for logprobs in actor.logprobs(sequences))


def _poison_gradients(actor, steps, value=NAN):
    """Turns one gradient of the optimizer steps whose number is in ``steps`` into ``value``."""
    step, seen = actor.optimizer.step, iter(range(1000))

    def poisoned(max_norm):
        if next(seen) in steps:
            actor.model.norm.weight.grad[2] = value
        return step(max_norm)

    actor.optimizer.step = poisoned


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_skipped_step_changes_nothing_and_says_why(value):
    actor = tiny_actor()
    sequences = random_sequences(4)
    actor.update(sequences)
    before, moments = weights_of(actor), actor.state_dict()
    _poison_gradients(actor, {0}, value)
    metrics = actor.update(sequences)
    assert metrics["actor/skipped_steps"] == metrics["actor/skipped_in_a_row"] == 1
    assert metrics["actor/nonfinite_tensors"] == 0
    assert len(actor.problems) == 1
    assert f"norm.weight holds 1 non-finite number of 32, the first {value} at [2]" in actor.problems[0]
    assert_same_bits(weights_of(actor), before)
    after = actor.state_dict()["parameters"]
    for name, saved in moments["parameters"].items():
        assert torch.equal(saved["exp_avg"], after[name]["exp_avg"])
        assert torch.equal(saved["exp_avg_sq"], after[name]["exp_avg_sq"])
        assert saved["num_steps"] == after[name]["num_steps"]
    assert actor.update(sequences)["actor/skipped_in_a_row"] == 0
    assert actor.problems == []


def test_skips_are_counted_in_a_row_over_mini_batches_and_updates():
    actor = tiny_actor(ppo_mini_batch_size=2)
    _poison_gradients(actor, {1, 2, 3, 4, 6})
    sequences = random_sequences(6)  # three optimizer steps an update
    seen = [actor.update(sequences) for _ in range(3)]
    assert [m["actor/skipped_steps"] for m in seen] == [2, 2, 1]
    assert [m["actor/skipped_in_a_row"] for m in seen] == [2, 4, 1]
    assert all(math.isfinite(m["actor/grad_norm"]) for m in seen)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loss_that_is_no_number_is_skipped_although_its_gradient_is_one(monkeypatch, value):
    loss = actor_module.micro_batch_loss

    def shifted(*args):
        total, shares = loss(*args)
        return total, shares | {"loss": shares["loss"] + value}

    monkeypatch.setattr(actor_module, "micro_batch_loss", shifted)
    actor = tiny_actor()
    before = weights_of(actor)
    metrics = actor.update(random_sequences(4))
    assert metrics["actor/skipped_steps"] == 1
    assert f"the loss was {value}, every gradient finite" in actor.problems[0]
    assert_same_bits(weights_of(actor), before)


def test_a_norm_that_overflows_is_skipped():
    actor = tiny_actor(grad_clip=INF)
    _poison_gradients(actor, {0}, 3e38)
    actor.model.norm.weight.register_hook(lambda grad: grad.fill_(3e38))
    assert actor.update(random_sequences(4))["actor/skipped_steps"] == 1
    assert "their norm overflows float32" in actor.problems[0]


@pytest.mark.parametrize("fsdp", [None, True])
def test_weights_that_an_update_breaks_are_counted(fsdp):
    actor = tiny_actor(optim=OptimConfig(lr=1e39), fsdp=fsdp)
    metrics = actor.update(random_sequences(4))
    assert metrics["actor/skipped_steps"] == 0
    assert metrics["actor/nonfinite_tensors"] >= 1
    assert any("embed_tokens.weight holds" in problem for problem in actor.problems)
    assert nonfinite_in(actor.state_dict()) is not None


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_no_number_is_counted_while_the_weights_still_are(key):
    """An infinite second moment freezes its weight and leaves it finite: nothing else would show it."""
    actor = tiny_actor()
    sequences = random_sequences(4)
    actor.update(sequences)
    getattr(actor.optimizer.state_of(actor.model.norm.weight), key)[5] = INF
    metrics = actor.update(sequences)
    assert metrics["actor/nonfinite_tensors"] >= 1
    assert any(problem.startswith(f"{key} of norm.weight holds 1 non-finite") for problem in actor.problems)


@pytest.mark.parametrize("key", ["weight", "exp_avg", "exp_avg_sq", "num_steps"])
def test_a_state_with_a_number_that_is_none_is_named_and_not_restored(key):
    actor = tiny_actor()
    actor.update(random_sequences(4))
    state = actor.state_dict()
    assert nonfinite_in(state) is None
    saved = state["parameters"]["norm.weight"]
    if key == "num_steps":
        saved[key] = NAN
    else:
        saved[key][1] = NAN
    what = "norm.weight" if key == "weight" else f"{key} of norm.weight"
    assert nonfinite_in(state).startswith(f"{what} holds 1 non-finite number")
    before = weights_of(actor)
    with pytest.raises(ValueError, match=rf"{key} of norm\.weight (holds 1 non-finite number|is nan)"):
        actor.load_state_dict(state)
    assert_same_bits(weights_of(actor), before)


def test_a_warm_up_does_not_skip_in_silence():
    pairs = [((1, a), (a, 2)) for a in range(3, 9)]
    config = SupervisedConfig(batch_size=4, optim=OptimConfig(lr=1e39, weight_decay=0.0))
    with pytest.raises(NonFiniteError, match=r"warm-up step 1: the gradient norm is nan; lower the learning rate"):
        supervised_steps(tiny_model(), pairs, 3, config)
    with pytest.raises(NonFiniteError, match=r"after the warm-up, .* holds \d+ non-finite numbers"):
        supervised_steps(tiny_model(), pairs, 1, config)
