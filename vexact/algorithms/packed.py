"""Reductions over a packed layout: N sequences of given lengths stored one after another in T rows.

Everything runs in fp64 and is rounded once by the caller: these are N- or T-sized vectors, so the cost is nothing and
equal rewards give an advantage of exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_ids(lengths: Tensor) -> Tensor:
    """Sequence index of every row: lengths (N,) int64 -> (T,) int64."""
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of each sequence's rows, without atomics: values (T,), lengths (N,) -> (N,) in the dtype of ``values``."""
    return torch.segment_reduce(values, "sum", lengths=lengths)


def discounted_returns(token_rewards: Tensor, lengths: Tensor, gamma: float) -> Tensor:
    """Return-to-go of every token within its own sequence.

    G_t = r_t + gamma * G_{t+1}, computed by doubling: after the step with stride s every row holds its first 2s terms,
    so a sequence of length L needs log2(L) vector operations and no loop over tokens.

    token_rewards (T,) fp64, lengths (N,) int64 -> (T,) fp64.
    """
    ids = segment_ids(lengths)
    returns, stride = token_rewards.clone(), 1
    longest = int(lengths.max()) if lengths.numel() else 0
    while stride < longest:
        same_sequence = (ids[:-stride] == ids[stride:]).to(returns.dtype)
        later = returns[stride:] * same_sequence
        returns = torch.cat([returns[:-stride] + gamma**stride * later, returns[-stride:]])
        stride *= 2
    return returns


def whiten(values: Tensor) -> Tensor:
    """Zero mean, unit (unbiased) variance over all rows, with verl's 1e-8 inside the root. values (T,) fp64."""
    if values.numel() < 2:
        raise ValueError(
            f"REINFORCE++ whitens advantages over all response tokens of the batch and got {values.numel()} token(s); "
            "use a larger data.train_batch_size or another algorithm.adv_estimator"
        )
    return (values - values.mean()) * torch.rsqrt(values.var(unbiased=True) + 1e-8)


class Groups:
    """Per-group statistics of one value per sequence.

    Values are shifted by their group's minimum before they are averaged, so a group of equal values has exactly that
    value as its mean and exactly zero spread (a rounding error there would be blown up by 1 / (std + 1e-6)).
    """

    def __init__(self, values: Tensor, group_ids: Tensor) -> None:
        """values (N,) fp64, group_ids (N,) int64; a group need not be contiguous."""
        _, self.inverse = torch.unique(group_ids, return_inverse=True)  # (N,)
        self.num_groups = int(self.inverse.max()) + 1
        self.sizes = torch.bincount(self.inverse, minlength=self.num_groups)  # (G,)
        lowest = values.new_full((self.num_groups,), torch.inf)
        lowest.scatter_reduce_(0, self.inverse, values, "amin")
        self.shifted = values - lowest[self.inverse]
        self.shifted_mean = self.sum(self.shifted) / self.sizes
        self.size_of = self.sizes[self.inverse]  # (N,)
        self.centred = self.shifted - self.shifted_mean[self.inverse]  # (N,) value minus the mean of its group

    def sum(self, values: Tensor) -> Tensor:
        """Sum per group: (N,) -> (G,)."""
        return values.new_zeros(self.num_groups).index_add_(0, self.inverse, values)

    def std(self) -> Tensor:
        """Unbiased standard deviation of every sequence's own group, (N,); zero for a group of one."""
        variance = self.sum(self.centred.square()) / (self.sizes - 1).clamp_min(1)
        return variance.sqrt()[self.inverse]
