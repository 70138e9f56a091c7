"""Micro-batch packing and the packed tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.batches.packing import pack


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
