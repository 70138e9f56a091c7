"""Micro-batch packing and the packed tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.batches.packing import idle_share, pack


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 30), min_size=0, max_size=40), balance=st.booleans(), slack=st.integers(0, 40))
def test_every_sequence_lands_in_exactly_one_group_within_the_budget(lengths, balance, slack):
    budget = max(lengths, default=1) + slack
    groups = pack(lengths, budget, balance=balance)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(group and sum(lengths[i] for i in group) <= budget for group in groups)
    assert groups == pack(lengths, budget, balance=balance)


def test_balanced_groups_are_even():
    groups = pack([10, 1, 1, 1, 1, 10, 8, 8], budget=22, balance=True)
    assert sorted(sum([10, 1, 1, 1, 1, 10, 8, 8][i] for i in group) for group in groups) == [20, 20]


@pytest.mark.parametrize("prompts", [5, 16, 48, 200])
def test_1_2_4_and_8_ranks_have_rounds_that_are_full_and_even(prompts):
    for lengths in ([1536] * 8 * prompts, np.random.default_rng(prompts).integers(64, 3000, 8 * prompts).tolist()):
        groups = pack(lengths, 8192, balance=True)
        assert len(groups) % 8 == 0
        assert len(groups) < 1.1 * sum(lengths) / 8192 + 8
        squares = [sum(lengths[i] ** 2 for i in group) for group in groups]
        assert squares == sorted(squares, reverse=True)
        assert idle_share(groups, lengths, 1) == 0
        assert all(idle_share(groups, lengths, ranks) < 0.04 for ranks in (2, 4, 8))


def test_ranks_that_need_not_be_forgotten_all_get_equally_many_groups():
    for ranks in (1, 2, 3, 6, 64):
        groups = pack([1000] * 200, 8192, balance=True, ranks=ranks)
        assert len(groups) % ranks == 0
        assert 25 <= len(groups) < 25 + ranks + 3
    assert pack([3, 3], 100, balance=True, ranks=8) == [[0], [1]]
    assert len(pack([1] * 9, 100, balance=True, ranks=8)) == 8
    assert pack([1] * 9, 100, balance=True) == [list(range(9))]


def test_groups_are_more_where_the_sum_of_tokens_would_fit_but_no_group_has_room():
    assert len(pack([5] * 9, budget=9, balance=True)) == 9  # five groups have the tokens' room, each for one sequence
    assert pack([], 9, balance=True) == []


def test_a_sequence_over_the_budget_is_named_with_the_key_to_raise():
    with pytest.raises(ValueError, match=r"row-7 has 12 tokens, more than .*ppo_max_token_len_per_gpu=10; raise"):
        pack([3, 12], 10, names=["row-3", "row-7"])


def test_packed_tensors_of_two_sequences():
    floor = np.array([-1.5], np.float32)
    batch = pack_tokens([TokenSequence((5, 6, 7), (8, 9)), TokenSequence((1, 2), (3,), 2.0, floor)])
    # The last response token is a target but no input: [5 6 7 8 | 1 2]; rows 2, 3 predict 8, 9 and row 5 predicts 3.
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 1, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.attention.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.attention.max_seqlen == 4
    assert batch.targets.rows.tolist() == [2, 3, 5]
    assert batch.targets.token_ids.tolist() == [8, 9, 3]
    assert batch.targets.inv_temperature.tolist() == [1.0, 1.0, 2.0]
    assert batch.targets.min_logit.tolist() == [-torch.inf, -torch.inf, -1.5]
    assert batch.response_lengths.tolist() == [2, 1]


@pytest.mark.parametrize(("prompt", "response", "part"), [((), (1,), "prompt"), ((1,), (), "response")])
def test_empty_parts_are_refused(prompt, response, part):
    with pytest.raises(ValueError, match=f"sequence 0 has an empty {part}"):
        pack_tokens([TokenSequence(prompt, response)])
