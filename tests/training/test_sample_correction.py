"""Corrections in whole updates: no-ops where the policies agree, the formula where not, however they are packed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks_support import digest
from training_support import CORRECTIONS, gradients_of_update, random_sequences, tiny_actor, tiny_model

from vexact.algorithms import CorrectionConfig, Rejection
from vexact.training import Actor, ActorConfig

LOSSES = {
    "reinforce": {"loss_mode": "reinforce"},
    "vanilla": {"loss_agg_mode": "seq-mean-token-mean", "use_kl_loss": True, "kl_loss_coef": 0.3},
    "gspo": {"loss_mode": "gspo", "entropy_coeff": 0.01},
}


def exact_sequences(count=6):
    """Sequences whose rollout's log-probabilities are those of the trainer."""
    sequences = random_sequences(count, ref_logprobs=True)
    values = tiny_actor().logprobs(sequences)
    return [replace(s, sample=replace(s.sample, logprobs=v)) for s, v in zip(sequences, values, strict=True)]


def off_by(sequences, scale=0.2):
    """The same with a rollout that was off, the trainer's log-probabilities recomputed."""
    rng = np.random.default_rng(1)
    found = []
    for s in sequences:
        noise = rng.normal(0, scale, len(s.advantages)).astype(np.float32)
        theirs = replace(s.sample, logprobs=s.sample.logprobs + noise)
        found.append(replace(s, sample=theirs, recomputed_logprobs=s.sample.logprobs))
    return found


def trained(sequences, correction=None, **config):
    correction = CorrectionConfig() if correction is None else correction
    actor = tiny_actor(correction=correction, **config)
    metrics = actor.update(sequences)
    return digest(actor.state_dict()), metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_every_correction_of_an_exact_rollout_changes_no_bit(loss):
    sequences = exact_sequences()
    plain, _ = trained(sequences, **LOSSES[loss])
    for name, correction in CORRECTIONS.items():
        for bypass in (True, False):
            same, metrics = trained(sequences, replace(correction, bypass=bypass), **LOSSES[loss])
            assert same == plain, (name, bypass)
            seen = {key: value for key, value in metrics.items() if key.startswith("rollout_corr/")}
            assert seen
            assert all(value in (0, 1) for value in seen.values()), seen


def test_a_decoupled_exact_update_stays_unchanged_over_later_optimizer_steps():
    sequences, steps = exact_sequences(), {"ppo_mini_batch_size": 2, "ppo_epochs": 2, "shuffle": True}
    plain, _ = trained(sequences, **steps)
    decoupled, _ = trained(sequences, replace(CORRECTIONS["all"], bypass=False), **steps)
    bypass, _ = trained(sequences, CORRECTIONS["all"], **steps)
    assert decoupled == plain != bypass, "a bypass follows the policy as it moves away from the samples"


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("bypass", [True, False])
def test_a_mismatch_is_corrected_and_packing_changes_no_factor(name, bypass):
    sequences = off_by(exact_sequences())
    if bypass:
        sequences = [replace(s, recomputed_logprobs=None) for s in sequences]
    correction = replace(CORRECTIONS[name], bypass=bypass)
    plain, _ = trained(sequences, loss_mode="reinforce")
    changed, metrics = trained(sequences, correction, loss_mode="reinforce")
    assert changed != plain
    seen = {key: value for key, value in metrics.items() if key.startswith("rollout_corr/")}
    if correction.level is not None:
        assert seen["rollout_corr/rollout_is_eff_sample_size"] < 1
        assert seen["rollout_corr/rollout_is_std"] > 0
    if correction.rejections:
        assert 0 < seen["rollout_corr/rollout_rs_masked_fraction"] < 1
    _, small = trained(sequences, correction, loss_mode="reinforce", ppo_max_token_len_per_gpu=16)
    assert seen == {key: value for key, value in small.items() if key.startswith("rollout_corr/")}
    assert small["actor/pg_loss"] == pytest.approx(metrics["actor/pg_loss"], rel=1e-5)


@pytest.mark.parametrize("entropy_coeff", [0.0, 1e-12])
def test_the_gradient_is_that_of_the_weighted_loss(entropy_coeff):
    """A weight on the loss of a token is a weight on its advantage, in both forms of the head's backward."""
    sequences = off_by(exact_sequences())
    ratios = [np.exp(s.recomputed_logprobs.astype(np.float64) - s.sample.logprobs) for s in sequences]
    by_hand = [
        replace(s, advantages=(s.advantages * np.minimum(r, 1.1)).astype(np.float32))
        for s, r in zip(sequences, ratios, strict=True)
    ]
    config = {"loss_mode": "reinforce", "grad_clip": 1e9, "entropy_coeff": entropy_coeff}
    corrected = tiny_actor(correction=CorrectionConfig("token", 1.1, bypass=False), **config)
    _, found = gradients_of_update(corrected, sequences)
    _, expected = gradients_of_update(tiny_actor(**config), by_hand)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_rejected_sequences_are_as_good_as_absent():
    """With token-mean and decoupled: they leave the policy loss, the KL term and the mean."""
    sequences = exact_sequences()
    far = off_by(sequences[:2], scale=3.0)
    kept = [replace(s, recomputed_logprobs=s.sample.logprobs) for s in sequences[2:]]
    config = {"use_kl_loss": True, "kl_loss_coef": 0.3, "grad_clip": 1e9}
    correction = CorrectionConfig(rejections=(Rejection("seq_max_k2", 0.01),), bypass=False)
    with_them = Actor(tiny_model(), ActorConfig(correction=correction, **config))
    metrics, found = gradients_of_update(with_them, far + kept)
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(2 / 6)
    _, expected = gradients_of_update(Actor(tiny_model(), ActorConfig(**config)), kept)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_an_update_of_which_nothing_is_kept_has_no_gradient():
    sequences = off_by(exact_sequences(), scale=3.0)
    correction = CorrectionConfig(rejections=(Rejection("seq_max_k2", 1e-9),), bypass=False)
    _, metrics = trained(sequences, correction, loss_mode="vanilla")
    assert metrics["actor/grad_norm"] == metrics["actor/pg_loss"] == 0
    assert metrics["actor/skipped_steps"] == 0
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == 1
