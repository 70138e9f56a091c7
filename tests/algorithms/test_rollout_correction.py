"""Importance weights, rejection and the scales they become, against numbers worked out by hand."""

import math

import pytest
import torch

from vexact.algorithms import CorrectionConfig, Rejection, importance_weights, kept_tokens, loss_scales

# Two sequences; ratios 1, 2, 4 and 1/2, 1/8: products 8 and 1/16.
LN2 = math.log(2)
D = torch.tensor([0, LN2, 2 * LN2, -LN2, -3 * LN2], dtype=torch.float64)
LENGTHS = torch.tensor([3, 2])


def weights(**config):
    values, metrics = importance_weights(D, LENGTHS, CorrectionConfig(**config))
    return values.tolist(), {name.removeprefix("rollout_is_"): value for name, value in metrics.items()}


def kept(name, upper, lower=None, log_ratio=D):
    config = CorrectionConfig(rejections=(Rejection(name, upper, lower),))
    values, metrics = kept_tokens(log_ratio, LENGTHS, config)
    return [int(value) for value in values], metrics


def test_token_weights_are_cut_at_the_upper_bound():
    values, metrics = weights(level="token", upper=2.0)
    assert values == pytest.approx([1, 2, 2, 0.5, 0.125])
    # mean 5.625 / 5 = 1.125, mean of squares (1 + 4 + 4 + 1/4 + 1/64) / 5 = 1.853125
    assert metrics["mean"] == pytest.approx(1.125)
    assert metrics["std"] == pytest.approx(math.sqrt(1.853125 - 1.125**2))
    assert metrics["eff_sample_size"] == pytest.approx(1.125**2 / 1.853125)
    assert (metrics["max"], metrics["min"]) == pytest.approx((2, 0.125))
    assert metrics["ratio_fraction_high"] == pytest.approx(1 / 5)  # 4 > 2
    assert metrics["ratio_fraction_low"] == pytest.approx(1 / 5)  # 1/8 < 1/2
    # of sequences: 5/3 and 0.3125; before truncation 7/3 and 0.3125
    assert metrics["seq_mean"] == pytest.approx((5 / 3 + 0.3125) / 2)
    assert metrics["seq_std"] == pytest.approx((5 / 3 - 0.3125) / math.sqrt(2))
    assert metrics["seq_max_deviation"] == pytest.approx(0.6875)
    assert (metrics["seq_fraction_high"], metrics["seq_fraction_low"]) == (0.5, 0.5)


def test_two_bounds_zero_what_lies_outside():
    values, metrics = weights(level="token", lower=0.5, upper=3.0)
    assert values == pytest.approx([1, 2, 0, 0.5, 0])
    assert metrics["oob_ratio"] == pytest.approx(2 / 5)
    values, metrics = weights(level="sequence", lower=0.01, upper=3.0)
    assert values == pytest.approx([0, 0, 0, 1 / 16, 1 / 16])
    assert metrics["oob_ratio"] == pytest.approx(3 / 5)


def test_a_sequence_weight_is_the_product_of_its_ratios():
    values, metrics = weights(level="sequence", upper=5.0)
    assert values == pytest.approx([5, 5, 5, 1 / 16, 1 / 16])
    assert (metrics["max"], metrics["min"]) == pytest.approx((8, 1 / 16)), "those before truncation"
    assert metrics["mean"] == pytest.approx((15 + 1 / 8) / 5)
    assert (metrics["ratio_fraction_high"], metrics["ratio_fraction_low"]) == (0.5, 0.5)


def test_normalised_weights_have_mean_one_over_tokens_or_over_sequences():
    values, metrics = weights(level="token", upper=2.0, batch_normalize=True)
    assert metrics["batch_norm_factor"] == pytest.approx(1.125)
    assert values == pytest.approx([x / 1.125 for x in (1, 2, 2, 0.5, 0.125)])
    values, metrics = weights(level="sequence", upper=5.0, batch_normalize=True)
    factor = (5 + 1 / 16) / 2
    assert metrics["batch_norm_factor"] == pytest.approx(factor)
    assert values == pytest.approx([5 / factor] * 3 + [1 / 16 / factor] * 2)
    values, metrics = weights(level="token", lower=9.0, upper=10.0, batch_normalize=True)
    assert (values, metrics["batch_norm_factor"], metrics["eff_sample_size"]) == ([0] * 5, 1, 0)


def test_log_ratios_are_clamped_at_20():
    far = torch.tensor([500.0, -500.0, 0.0], dtype=torch.float64)
    values, _ = importance_weights(far, torch.tensor([3]), CorrectionConfig(level="token", upper=1e30))
    assert values.tolist() == pytest.approx([math.exp(20), math.exp(-20), 1])


@pytest.mark.parametrize(
    ("name", "bounds", "expected"),
    [
        # k1 = -d against log-bounds: -d in {0, -1, -2, 1, 3} ln 2, so bounds 1/2 .. 4 are -ln 2 .. 2 ln 2
        ("token_k1", (4.0, 0.5), [1, 1, 0, 1, 0]),
        # k2 = d^2 / 2: 0, 0.2402, 0.9609, 0.2402, 2.162
        ("token_k2", (0.5,), [1, 1, 0, 1, 0]),
        ("token_k2", (0.2,), [1, 0, 0, 0, 0]),
        # k3 = r - 1 - log r: 0, 0.3069, 1.6137, 0.1931, 1.2044
        ("token_k3", (0.3,), [1, 0, 0, 1, 0]),
        ("token_k3", (1.5,), [1, 1, 0, 1, 1]),
        # sums of k1: -3 ln 2 and 4 ln 2: ratios 1/8 and 16 of rollout to trainer
        ("seq_sum_k1", (16.1, 0.2), [0, 0, 0, 1, 1]),
        ("seq_sum_k1", (15.9, 0.12), [1, 1, 1, 0, 0]),
        # geometric means: 1/2 and 4
        ("seq_mean_k1", (3.9, 0.49), [1, 1, 1, 0, 0]),
        ("seq_mean_k1", (4.1, 0.51), [0, 0, 0, 1, 1]),
        # sums of k2: 1.2011 and 2.4023; means 0.4004 and 1.2011; maxima 0.9609 and 2.162
        ("seq_sum_k2", (2.0,), [1, 1, 1, 0, 0]),
        ("seq_mean_k2", (0.41,), [1, 1, 1, 0, 0]),
        ("seq_mean_k2", (0.39,), [0, 0, 0, 0, 0]),
        ("seq_max_k2", (1.0,), [1, 1, 1, 0, 0]),
        # sums of k3: 1.9206 and 1.3975; means 0.6402 and 0.6988; maxima 1.6137 and 1.2044
        ("seq_sum_k3", (1.5,), [0, 0, 0, 1, 1]),
        ("seq_mean_k3", (0.65,), [1, 1, 1, 0, 0]),
        ("seq_max_k3", (1.3,), [0, 0, 0, 1, 1]),
    ],
)
def test_rejection(name, bounds, expected):
    values, metrics = kept(name, *bounds)
    assert values == expected
    lost = [1 - value for value in expected]
    assert metrics[f"rollout_rs_{name}_masked_fraction"] == pytest.approx(sum(lost) / 5)
    assert metrics["rollout_rs_masked_fraction"] == pytest.approx(sum(lost) / 5)
    assert metrics["rollout_rs_seq_masked_fraction"] == (any(lost[:3]) + any(lost[3:])) / 2


def test_metrics_of_a_rejection():
    _, metrics = kept("seq_mean_k1", 3.9, 0.51)
    named = {key: metrics[f"rollout_rs_seq_mean_k1_{key}"] for key in ("max", "min", "fraction_high", "fraction_low")}
    assert named == pytest.approx({"max": 2 * LN2, "min": -LN2, "fraction_high": 0.5, "fraction_low": 0.5})
    assert metrics["rollout_rs_seq_mean_k1_mean"] == pytest.approx((3 * -LN2 + 2 * 2 * LN2) / 5)
    assert metrics["rollout_rs_seq_mean_k1_seq_mean"] == pytest.approx(LN2 / 2)
    assert metrics["rollout_rs_seq_mean_k1_seq_max_deviation"] == pytest.approx(2 * LN2)


def test_every_option_must_pass_and_a_veto_takes_the_sequence():
    both = (Rejection("token_k1", 4.0, 0.5), Rejection("token_k3", 0.3))
    values, metrics = kept_tokens(D, LENGTHS, CorrectionConfig(rejections=both))
    assert values.tolist() == [True, False, False, True, False]
    assert metrics["rollout_rs_token_k1_masked_fraction"] == pytest.approx(2 / 5)
    assert metrics["rollout_rs_token_k3_masked_fraction"] == pytest.approx(3 / 5)
    values, metrics = kept_tokens(D, LENGTHS, CorrectionConfig(veto=0.2))
    assert values.tolist() == [True, True, True, False, False]
    assert metrics == {"rollout_is_veto_fraction": 0.5, "rollout_is_catastrophic_token_fraction": pytest.approx(1 / 5)}
    assert all(kept_tokens(D, LENGTHS, CorrectionConfig(veto=0.1))[0])


KEPT = torch.tensor([True, True, False, False, True])
W = torch.tensor([1, 2, 2, 0.5, 0.125], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "bypass", "policy", "others"),
    [
        # decoupled: the mean is over the 3 kept of 5 tokens
        ("token-mean", False, [5 / 3, 10 / 3, 0, 0, 0.125 * 5 / 3], [5 / 3, 5 / 3, 0, 0, 5 / 3]),
        ("token-mean", True, [1, 2, 0, 0, 0.125], [1] * 5),
        # 2 of 3 and 1 of 2 are kept
        ("seq-mean-token-mean", False, [1.5, 3, 0, 0, 0.25], [1.5, 1.5, 0, 0, 2]),
        ("seq-mean-token-mean", True, [1.5, 3, 0, 0, 0.25], [1] * 5),
        ("seq-mean-token-sum", False, [1, 2, 0, 0, 0.125], [1, 1, 0, 0, 1]),
    ],
)
def test_scales_make_means_over_what_is_kept(mode, bypass, policy, others):
    scales = loss_scales(W, KEPT, LENGTHS, mode, CorrectionConfig(level="token", bypass=bypass))
    assert scales.policy.tolist() == pytest.approx(policy)
    assert scales.others.tolist() == pytest.approx(others)


def test_a_loss_with_the_ratio_in_it_takes_the_rejections_only():
    scales = loss_scales(W, KEPT, LENGTHS, "token-sum", CorrectionConfig(level="token", weights_apply=False))
    assert scales.policy.tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_a_batch_of_which_nothing_is_kept_counts_zero(mode):
    scales = loss_scales(None, torch.zeros(5, dtype=torch.bool), LENGTHS, mode, CorrectionConfig(bypass=False))
    assert not scales.policy.any()
    assert not scales.others.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_equal_policies_give_exactly_one(level, mode):
    lengths = torch.tensor([7, 1, 12, 3])
    zero = torch.zeros(23, dtype=torch.float64)
    rejections = (Rejection("seq_mean_k1", 1.0, 1.0), Rejection("seq_max_k3", 1e-12), Rejection("token_k2", 1e-12))
    config = CorrectionConfig(level, 1.0, 1.0, True, rejections, veto=0.999, bypass=False)
    values, metrics = importance_weights(zero, lengths, config)
    keep, rejected = kept_tokens(zero, lengths, config)
    scales = loss_scales(values, keep, lengths, mode, config)
    ones = torch.ones(23)
    assert torch.equal(scales.policy, ones)
    assert torch.equal(scales.others, ones)
    assert metrics["rollout_is_eff_sample_size"] == metrics["rollout_is_batch_norm_factor"] == 1
    assert metrics["rollout_is_std"] == metrics["rollout_is_oob_ratio"] == 0
    assert all(value == 0 for value in rejected.values()), rejected
