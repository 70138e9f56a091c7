"""Blocks that choose experts from the logits of their router, as older releases of transformers have them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vexact.swaps.logit_router import choose_in_router

WIDTH, EXPERTS = 24, 16


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_routed_experts = EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH) * 0.3)
        self.register_buffer("e_score_correction_bias", torch.linspace(-0.3, 0.3, EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, WIDTH).float(), self.weight.float())


class Cosine(Logits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.normalize(x, dim=-1))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * 20, WIDTH) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 20) * 0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("tkgh,th->tkg", self.gate_up_proj[index], x).chunk(2, dim=-1)
        return torch.einsum("tkhi,tki,tk->th", self.down_proj[index], F.silu(gate) * up, weights)


class Block(nn.Module):
    """The names of DeepSeek-V3, and its arithmetic by hand."""

    def __init__(self, gate: type[Logits] = Logits, normalize: bool = True) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate(), Experts(), nn.Linear(WIDTH, WIDTH)
        self.n_routed_experts, self.n_group, self.topk_group, self.top_k = EXPERTS, 4, 2, 3
        self.norm_topk_prob, self.routed_scaling_factor = normalize, 2.5

    def route_tokens_to_experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        biased = (scores + self.gate.e_score_correction_bias).unflatten(1, (self.n_group, -1))
        best = biased.topk(2, dim=2).values.sum(2).topk(self.topk_group, dim=1).indices
        outside = torch.ones(len(logits), self.n_group, dtype=torch.bool).scatter(1, best, False)
        index = biased.masked_fill(outside[..., None], float("-inf")).flatten(1).topk(self.top_k, dim=1).indices
        weights = scores.gather(1, index)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return index, weights * self.routed_scaling_factor

    def forward(self, x: Tensor) -> Tensor:
        index, weights = self.route_tokens_to_experts(self.gate(x))
        return self.experts(x.flatten(0, 1), index, weights).view_as(x) + self.shared_experts(x)


class Sharper(Block):
    def route_tokens_to_experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return super().route_tokens_to_experts(2 * logits)


class Louder(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_block_computes_what_it_did_and_a_token_has_the_bits_it_has_alone(normalize: bool) -> None:
    block, x = Block(normalize=normalize), torch.randn(2, 15, WIDTH)
    before, names = block(x), list(block.state_dict())
    assert choose_in_router(block) is not None
    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
    assert list(block.state_dict()) == names
    block.shared_experts = nn.Identity()  # torch's own product has other bits in other company
    assert torch.equal(block(x[1:, 3:9]), block(x)[1:, 3:9])


def test_the_router_says_what_was_chosen() -> None:
    block, x = Block(), torch.randn(2, 15, WIDTH)
    index, weights = block.route_tokens_to_experts(block.gate(x))
    choose_in_router(block)
    logits, ours, experts = block.gate(x)
    index, order = index.sort(1)
    assert torch.equal(experts, index)
    torch.testing.assert_close(ours, weights.gather(1, order))
    assert logits.dtype == ours.dtype == torch.float32


def test_going_back_leaves_nothing() -> None:
    block, x = Block(), torch.randn(1, 9, WIDTH)
    names, out = set(vars(block.gate)), block(x)
    back = choose_in_router(block)
    assert back is not None
    assert choose_in_router(block) is None, "it chooses in the router already"
    back()
    assert (type(block), type(block.gate), set(vars(block.gate))) == (Block, Logits, names)
    assert torch.equal(block(x), out)


@pytest.mark.parametrize("make", [Sharper, Louder, lambda: Block(Cosine)], ids=["choice", "sum", "logits"])
def test_another_formula_is_refused(make: type[Block]) -> None:
    with pytest.raises(ValueError, match="it scores, chooses or weighs experts in a way that is not known"):
        choose_in_router(make())


def test_other_modules_are_left_alone() -> None:
    assert choose_in_router(nn.Linear(4, 4)) is None
    assert (
        choose_in_router(nn.ModuleDict({"gate": Logits(), "experts": Experts(), "shared_experts": Experts()})) is None
    )
