"""The counting sort against walking all pairs."""

from __future__ import annotations

import pytest
import torch

from vexact.ops import group_tokens, stock
from vexact.ops.moe.groups import group_tokens_reference


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(0, 2, 4), (1, 1, 1), (1, 3, 3), (50, 2, 8), (33, 6, 64)])
@pytest.mark.parametrize("padding", [0.0, 0.3, 1.0])
def test_pairs_stand_by_expert_then_by_index(tokens: int, top_k: int, num_experts: int, padding: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :top_k].int()
    experts[torch.rand(tokens, top_k, generator=generator) < padding] = -1
    groups = group_tokens(experts, num_experts)
    assert all(part.dtype == torch.int32 for part in groups)
    for other in (group_tokens_reference(experts, num_experts), stock.group_tokens(experts, num_experts)):
        assert all(torch.equal(a, b) for a, b in zip(groups, other, strict=True))
    taken = groups.slots >= 0
    assert torch.equal(taken, experts >= 0)
    assert int(groups.offsets[-1]) == int(taken.sum())
    pairs = torch.arange(tokens * top_k, dtype=torch.int32).view(tokens, top_k)
    assert torch.equal(groups.rows[groups.slots[taken].long()], pairs[taken])


def test_every_negative_number_is_padding() -> None:
    experts = torch.tensor([[0, -1], [-7, 1], [-(2**31), 0]], dtype=torch.int32)
    groups = group_tokens(experts, 2)
    assert groups.slots.tolist() == [[0, -1], [-1, 2], [-1, 1]]
    assert groups.offsets.tolist() == [0, 2, 3]
    assert groups.rows.tolist() == [0, 5, 3, 0, 0, 0]


def test_a_strided_view_is_read_as_it_is() -> None:
    experts = torch.tensor([[1, 9, 0, 9], [2, 9, 1, 9]], dtype=torch.int32)[:, ::2]
    assert group_tokens(experts, 3).rows.tolist() == [1, 0, 3, 2]
