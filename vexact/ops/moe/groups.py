"""Tokens by expert: where each pair of a token and one of its experts stands, without leaving the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vexact.ops.checks import check_dims
from vexact.ops.dispatch import backend

NO_EXPERT = -1  # of a pair that no expert computes


class ExpertGroups(NamedTuple):
    """The P = T k pairs in the order of (expert, pair index), where pair t k + j is choice j of token t."""

    rows: Tensor  # (P,) int32: the pair at each place; 0 past the last place that is taken
    slots: Tensor  # (T, k) int32: the place of each pair, -1 for a pair without expert
    offsets: Tensor  # (E+1,) int32: expert e has the places offsets[e] ... offsets[e+1] - 1

    @property
    def top_k(self) -> int:
        return self.slots.shape[1]


def group_tokens(experts: Tensor, num_experts: int) -> ExpertGroups:
    """Counting sort of (T, k) int32 experts; a negative one is a pair that no expert gets (padding).

    Raises:
        ValueError: not (T, k) int32, or no experts; on the CPU also an expert that is not below ``num_experts``.
    """
    check_dims("group_tokens", 2, "(T, k)", experts=experts)
    if experts.dtype != torch.int32:
        raise ValueError(f"group_tokens: experts are {experts.dtype}, expected torch.int32 as route gives them")
    if num_experts < 1:
        raise ValueError(f"group_tokens: num_experts={num_experts}; there must be one")
    experts = experts.contiguous()
    return ExpertGroups(*backend("moe.groups", experts).forward(experts, num_experts))


def group_tokens_reference(experts: Tensor, num_experts: int) -> ExpertGroups:
    """The same by walking the pairs."""
    flat, places = experts.flatten().tolist(), []
    offsets = [0]
    for expert in range(num_experts):
        places += [pair for pair, chosen in enumerate(flat) if chosen == expert]
        offsets.append(len(places))
    rows, slots = [0] * len(flat), [-1] * len(flat)
    for place, pair in enumerate(places):
        rows[place], slots[pair] = pair, place
    as_ints = (torch.tensor(x, dtype=torch.int32, device=experts.device) for x in (rows, slots, offsets))
    rows_, slots_, offsets_ = as_ints
    return ExpertGroups(rows_, slots_.view(experts.shape), offsets_)
