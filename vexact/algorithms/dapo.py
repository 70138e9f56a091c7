"""DAPO's two additions around the loss: dynamic sampling and the soft penalty on overlong responses.

https://arxiv.org/abs/2503.14476, sections 3.2 and 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def informative_groups(metric_values: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the groups that teach something: those whose metric differs between samples.

    A group of one has no spread and is kept, as in verl's ``filter_groups``.

    >>> informative_groups([[1, 1, 1], [0, 1, 0], [0, 0], [1]])
    [1, 3]
    """
    return [i for i, values in enumerate(metric_values) if len(values) == 1 or len(set(values)) > 1]


def overlong_penalty(lengths: Tensor, max_response_length: int, buffer_length: int, penalty_factor: float) -> Tensor:
    """What to add to the reward of a response of each length: (N,) int64 -> (N,) fp32, at most 0.

    Zero up to ``max_response_length - buffer_length``, then falling linearly to ``-penalty_factor`` at the maximum.
    Raises ValueError when the buffer does not fit.

    >>> import torch
    >>> overlong_penalty(torch.tensor([6, 7, 10]), max_response_length=10, buffer_length=4, penalty_factor=1.0).tolist()
    [0.0, -0.25, -1.0]
    """
    if not 0 < buffer_length <= max_response_length:
        raise ValueError(
            f"overlong_buffer.len must be between 1 and the maximum response length {max_response_length}, "
            f"got {buffer_length}"
        )
    exceeded = (lengths - (max_response_length - buffer_length)).clamp_min(0)
    return 0.0 - exceeded.float() / buffer_length * penalty_factor
