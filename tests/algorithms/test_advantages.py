"""Advantage estimators against numbers worked out by hand."""

import math

import pytest
import torch

from vexact.algorithms import ADVANTAGE_ESTIMATORS, AdvantageConfig, AdvantageInputs, advantage_estimator


def estimate(name, rewards, group_ids, lengths, kl_penalty=None, **config):
    inputs = AdvantageInputs(
        torch.tensor(rewards),
        torch.tensor(group_ids),
        torch.tensor(lengths),
        None if kl_penalty is None else torch.tensor(kl_penalty),
    )
    result = advantage_estimator(name)(inputs, AdvantageConfig(**config))
    assert result.dtype == torch.float32
    assert result.shape == (sum(lengths),)
    return result.tolist()


def test_grpo_divides_by_the_unbiased_std_of_the_group():
    # Group 4: rewards 1, 0, 0, 1: mean 0.5, variance 4 * 0.25 / 3 = 1/3. Group 9: rewards 2, 4: mean 3, variance 2.
    high = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    wide = 1.0 / (math.sqrt(2.0) + 1e-6)
    got = estimate("grpo", [1.0, 0.0, 2.0, 0.0, 4.0, 1.0], [4, 4, 9, 4, 9, 4], [2, 1, 1, 3, 2, 1])
    expected = [high, high, -high, -wide, -high, -high, -high, wide, wide, high]
    assert got == pytest.approx(expected, rel=1e-6)


def test_grpo_of_equal_rewards_is_exactly_zero():
    got = estimate("grpo", [0.1, 0.1, 0.1], [0, 0, 0], [1, 2, 3])
    assert got == [0.0] * 6


def test_grpo_subtracts_the_summed_kl_penalty_from_the_outcome():
    # Outcomes 1 - (0.1 + 0.2) = 0.7 and 0 - (-0.3) = 0.3: mean 0.5, std sqrt(2 * 0.04) = 0.2828.
    scaled = 0.2 / (math.sqrt(0.08) + 1e-6)
    got = estimate("grpo", [1.0, 0.0], [0, 0], [2, 1], kl_penalty=[0.1, 0.2, -0.3])
    assert got == pytest.approx([scaled, scaled, -scaled], rel=1e-5)


def test_norm_adv_by_std_false_and_dr_grpo_only_centre():
    expected = [0.75, 0.75, -0.25, -0.25, -0.25]
    arguments = ([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], [2, 1, 1, 1])
    assert estimate("grpo", *arguments, norm_adv_by_std_in_grpo=False) == expected
    assert estimate("dr_grpo", *arguments) == expected


def test_rloo_compares_with_the_mean_of_the_others():
    # Others' means: (0 + 5) / 2 = 2.5, (2 + 5) / 2 = 3.5, (2 + 0) / 2 = 1.
    got = estimate("rloo", [2.0, 0.0, 5.0], [3, 3, 3], [1, 2, 1])
    assert got == pytest.approx([-0.5, -3.5, -3.5, 4.0])


@pytest.mark.parametrize(("name", "expected"), [("grpo", 3.0 / (1 + 1e-6)), ("dr_grpo", 3.0), ("rloo", 3.0)])
def test_a_group_of_one_keeps_its_reward(name, expected):
    assert estimate(name, [3.0], [0], [2]) == pytest.approx([expected, expected], rel=1e-7)


def test_reinforce_plus_plus_whitens_discounted_returns():
    # Token rewards [0, 0, 1 | 0, -1] minus penalties [0, 0.5, 0 | 0, 0]; gamma 0.5:
    # returns [0.25 - 0.25, 0.5 - 0.5, 1 | -0.5, -1] = [0, 0, 1, -0.5, -1].
    # Mean -0.1; deviations [0.1, 0.1, 1.1, -0.4, -0.9]; squares sum to 2.2; variance 2.2 / 4 = 0.55.
    scale = 1 / math.sqrt(0.55 + 1e-8)
    got = estimate("reinforce_plus_plus", [1.0, -1.0], [0, 1], [3, 2], kl_penalty=[0, 0.5, 0, 0, 0.0], gamma=0.5)
    assert got == pytest.approx([0.1 * scale, 0.1 * scale, 1.1 * scale, -0.4 * scale, -0.9 * scale], rel=1e-5)


def test_reinforce_plus_plus_returns_stay_inside_their_sequence():
    # Undiscounted, no penalty: every token of a sequence has its reward. [1]*5, [0]*7: mean 5/12.
    mean = 5 / 12
    std = math.sqrt((5 * (1 - mean) ** 2 + 7 * mean**2) / 11 + 1e-8)
    got = estimate("reinforce_plus_plus", [1.0, 0.0], [0, 0], [5, 7])
    assert got == pytest.approx([(1 - mean) / std] * 5 + [-mean / std] * 7, rel=1e-5)


def test_reinforce_plus_plus_baseline_centres_per_group_then_whitens_tokens():
    # Group 0: 1, 0 -> 0.5, -0.5 on 1 and 3 tokens. Group 1 has one sequence and keeps 1.0 on 1 token.
    # Tokens [0.5, -0.5, -0.5, -0.5, 1]: mean 0; squares sum 4 * 0.25 + 1 = 2; variance 2/4 = 0.5.
    scale = 1 / math.sqrt(0.5 + 1e-8)
    got = estimate("reinforce_plus_plus_baseline", [1.0, 0.0, 1.0], [0, 0, 1], [1, 3, 1])
    assert got == pytest.approx([0.5 * scale, -0.5 * scale, -0.5 * scale, -0.5 * scale, scale], rel=1e-5)


def test_whitening_one_token_is_refused():
    with pytest.raises(ValueError, match=r"1 token.*data\.train_batch_size"):
        estimate("reinforce_plus_plus", [1.0], [0], [1])


def test_unknown_estimator_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"adv_estimator 'gae'; choose one of grpo, dr_grpo, rloo"):
        advantage_estimator("gae")


@pytest.mark.parametrize(
    ("rewards", "lengths", "kl_penalty", "message"),
    [
        ([1.0, 2.0], [1, 0], None, "sequence 1 has 0 response tokens"),
        ([1.0, float("nan")], [1, 1], None, "reward of sequence 1 is nan"),
        ([1.0], [1, 1], None, "share one shape"),
        ([1.0, 2.0], [1, 2], [0.0, 0.0], r"kl_penalty must have shape \(3,\)"),
    ],
)
def test_bad_inputs_are_named(rewards, lengths, kl_penalty, message):
    with pytest.raises(ValueError, match=message):
        estimate("grpo", rewards, [0] * len(lengths), lengths, kl_penalty)


def test_every_estimator_ignores_the_order_of_sequences():
    rewards, groups, lengths = [1.0, 0.0, 0.5, 2.0, 0.0], [1, 0, 1, 0, 0], [2, 3, 1, 1, 4]
    order = [3, 0, 4, 2, 1]
    for name in ADVANTAGE_ESTIMATORS:
        straight = torch.tensor(estimate(name, rewards, groups, lengths)).split(lengths)
        permuted = estimate(name, *([values[i] for i in order] for values in (rewards, groups, lengths)))
        torch.testing.assert_close(torch.tensor(permuted), torch.cat([straight[i] for i in order]))
