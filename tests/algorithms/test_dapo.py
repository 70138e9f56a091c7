"""DAPO's dynamic sampling filter and overlong penalty."""

import pytest
import torch

from vexact.algorithms import informative_groups, overlong_penalty


def test_groups_without_spread_are_dropped_and_groups_of_one_kept():
    assert informative_groups([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0], [0.5, 0.25]]) == [1, 3, 4]


def test_overlong_penalty_is_linear_inside_the_buffer():
    # Maximum 20, buffer 5: free up to 15, then -2 * (length - 15) / 5.
    lengths = torch.tensor([1, 15, 16, 18, 20])
    penalty = overlong_penalty(lengths, max_response_length=20, buffer_length=5, penalty_factor=2.0)
    assert penalty.tolist() == pytest.approx([0.0, 0.0, -0.4, -1.2, -2.0])


@pytest.mark.parametrize("buffer_length", [0, 21])
def test_a_buffer_that_does_not_fit_is_refused(buffer_length):
    with pytest.raises(ValueError, match=rf"overlong_buffer.len must be between 1 and .* 20, got {buffer_length}"):
        overlong_penalty(torch.tensor([1]), 20, buffer_length, 1.0)
