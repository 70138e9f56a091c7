"""Policy losses, KL penalties and aggregation against numbers worked out by hand."""

import math

import pytest
import torch

from vexact.algorithms import (
    Denominators,
    PolicyLossConfig,
    PolicyLossInputs,
    aggregate,
    kl_penalty,
    policy_loss,
    token_weights,
)


def loss_of(name, log_ratios, advantages, lengths, old=-1.0, **config):
    """Losses, d(sum of losses)/d(logprobs) and metrics for given log-ratios."""
    old_logprobs = torch.full((len(log_ratios),), old)
    logprobs = (old_logprobs + torch.tensor(log_ratios)).requires_grad_()
    inputs = PolicyLossInputs(logprobs, old_logprobs, torch.tensor(advantages), torch.tensor(lengths))
    output = policy_loss(name)(inputs, PolicyLossConfig(**config))
    output.losses.sum().backward()
    return output.losses.tolist(), logprobs.grad.tolist(), {k: v.tolist() for k, v in output.metrics.items()}


def test_ppo_clip_has_its_own_bound_on_each_side_and_a_dual_clip():
    log_ratios = [math.log(r) for r in (1.0, 1.5, 0.5, 1.5, 0.5, 5.0)]
    advantages = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    losses, grads, metrics = loss_of(
        "vanilla", log_ratios, advantages, [6], clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0
    )
    # A=2: r=1 -> -2; r=1.5 clipped to 1.28 -> -2.56; r=0.5 -> max(-1, -1.6) = -1 (not clipped).
    # A=-2: r=1.5 -> max(3, 2.56) = 3; r=0.5 clipped to 0.8 -> max(1, 1.6) = 1.6; r=5 -> 10, dual clip 2 * 3 = 6.
    assert losses == pytest.approx([-2.0, -2.56, -1.0, 3.0, 1.6, 6.0], rel=1e-5)
    # d(-A r)/dlogprob = -A r where the loss is not clipped, else 0.
    assert grads == pytest.approx([-2.0, 0.0, -1.0, 3.0, 0.0, 0.0], rel=1e-5)
    assert metrics["pg_clipfrac"] == [0, 1, 0, 0, 1, 0]
    assert metrics["pg_clipfrac_lower"] == [0, 0, 0, 0, 0, 1]
    assert metrics["ppo_kl"] == pytest.approx([-x for x in log_ratios], abs=1e-6)


def test_clip_ratio_is_used_where_a_side_is_not_given():
    losses, _, _ = loss_of("vanilla", [math.log(2.0), math.log(0.5)], [1.0, -1.0], [2], clip_ratio=0.1)
    assert losses == pytest.approx([-1.1, 0.9], rel=1e-5)


def test_on_policy_ppo_clip_is_exactly_minus_the_advantage():
    losses, grads, metrics = loss_of("vanilla", [0.0, 0.0], [0.3, -0.7], [1, 1])
    assert losses == torch.tensor([-0.3, 0.7]).tolist()
    assert grads == torch.tensor([-0.3, 0.7]).tolist()
    assert all(value == [0.0, 0.0] for value in metrics.values())


def test_gspo_uses_the_geometric_mean_ratio_of_each_sequence():
    # Sequence 1: mean log-ratio 0.001 -> s = e^0.001 = 1.001 > 1 + 4e-4 and A > 0: clipped to 1.0004.
    # Sequence 2: mean log-ratio (0.0004 - 0.0002) / 2 = 0.0001 -> s = e^0.0001, not clipped; A = -2 -> loss 2 s.
    losses, grads, metrics = loss_of(
        "gspo", [0.003, 0.0, 0.0, 0.0004, -0.0002], [1.0] * 3 + [-2.0] * 2, [3, 2], 0.0, clip_ratio_low=3e-4,
        clip_ratio_high=4e-4,
    )  # fmt: skip
    free = 2 * math.exp(0.0001)
    assert losses == pytest.approx([-1.0004] * 3 + [free] * 2, rel=1e-6)
    assert grads == pytest.approx([0.0] * 3 + [free] * 2, rel=1e-6)
    assert metrics["pg_clipfrac"] == [1, 1, 1, 0, 0]
    assert metrics["ppo_kl"] == pytest.approx([-0.003, 0, 0, -0.0004, 0.0002], abs=1e-9)


def test_gpg_and_reinforce_are_minus_advantage_times_logprob():
    for name in ("reinforce", "gpg"):
        losses, grads, metrics = loss_of(name, [0.0, 0.5], [2.0, -1.0], [2], old=-1.5)
        assert losses == pytest.approx([3.0, -1.0])
        assert grads == [-2.0, 1.0]
        assert metrics == {"ppo_kl": [0.0, -0.5]}


def test_unknown_loss_and_bad_clip_values_are_named():
    with pytest.raises(ValueError, match=r"loss_mode 'ppo'; choose one of vanilla, gspo, reinforce, gpg"):
        policy_loss("ppo")
    with pytest.raises(ValueError, match=r"clip_ratio_c must be greater than 1, got 0\.5"):
        PolicyLossConfig(clip_ratio_c=0.5)
    with pytest.raises(ValueError, match=r"clip_ratio_low must be in \(0, 1\), got 1\.5"):
        PolicyLossConfig(clip_ratio_low=1.5)


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        # logprob - ref = 0.5: k1 0.5, k2 0.125, k3 e^-0.5 + 0.5 - 1 with derivative 1 - e^-0.5.
        ("kl", 0.5, 1.0),
        ("abs", 0.5, 1.0),
        ("mse", 0.125, 0.5),
        ("low_var_kl", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
        ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
        ("k3+", math.exp(-0.5) - 0.5, 0.5),
    ],
)
def test_kl_penalties(kind, value, gradient):
    logprobs = torch.tensor([-1.0], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([-1.5]), kind)
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(value, rel=1e-6)
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-6)


def test_kl_of_equal_logprobs_is_exactly_zero_and_unknown_kinds_are_refused():
    same = torch.tensor([-0.123, -7.5])
    for kind in ("kl", "abs", "mse", "low_var_kl", "k3+"):
        assert kl_penalty(same, same, kind).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="unknown KL penalty 'full'"):
        kl_penalty(same, same, "full")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Sequences [1, 2, 3] and [10]: sums 6 and 10, means 2 and 10.
        ("token-mean", 16 / 4),
        ("token-sum", 16),
        ("seq-mean-token-sum", (6 + 10) / 2),
        ("seq-mean-token-mean", (2 + 10) / 2),
        ("seq-mean-token-sum-norm", (6 + 10) / 2 / 8),
    ],
)
def test_aggregation_modes_and_that_micro_batches_add_up(mode, expected):
    whole = Denominators(num_tokens=4, num_sequences=2, scale_factor=8)
    values, lengths = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([3, 1])
    assert aggregate(values, lengths, mode, whole).item() == pytest.approx(expected)
    parts = aggregate(values[:3], lengths[:1], mode, whole) + aggregate(values[3:], lengths[1:], mode, whole)
    assert parts.item() == pytest.approx(expected)


def test_aggregation_refuses_what_it_cannot_compute():
    with pytest.raises(ValueError, match="loss_agg_mode 'mean'; choose one of token-mean"):
        token_weights(torch.tensor([1]), "mean", Denominators(1, 1))
    with pytest.raises(ValueError, match=r"set it to a positive constant such as data\.max_response_length"):
        token_weights(torch.tensor([1]), "seq-mean-token-sum-norm", Denominators(1, 1))
