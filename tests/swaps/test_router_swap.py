"""Routers and experts of transformers on our operators: its own numbers, and the bits that a token has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

from vexact.ops import hf
from vexact.swaps.router import router_class

COMMON = {"hidden_size": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, **COMMON}
ROUTERS: list[tuple[Any, Any]] = [
    (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=16, norm_topk_prob=True, **COMMON)),
    (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=16, norm_topk_prob=False, **COMMON)),
    (MixtralTopKRouter, MixtralConfig(num_local_experts=16, hidden_size=32, num_experts_per_tok=2)),
    (DeepseekV2TopkRouter, DeepseekV2Config(topk_method="group_limited_greedy", **GROUPS)),
    (DeepseekV2TopkRouter, DeepseekV2Config(topk_method="greedy", **GROUPS)),
    (DeepseekV3TopkRouter, DeepseekV3Config(norm_topk_prob=True, **GROUPS)),
    (DeepseekV3TopkRouter, DeepseekV3Config(norm_topk_prob=False, **GROUPS)),
]
BLOCKS: list[tuple[Any, Any]] = [
    (Qwen3MoeSparseMoeBlock, ROUTERS[0][1]),
    (DeepseekV3MoE, DeepseekV3Config(n_shared_experts=2, **GROUPS)),
]


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor, std=0.3)
    return module


def put_ours(module: nn.Module) -> nn.Module:
    """Router, experts; what else there is stays torch's."""
    hf.register()
    for child in list(module.modules()):
        swap = router_class(child)
        if swap is not None:
            child.__class__ = swap
        if hasattr(child, "config"):
            child.config._experts_implementation = hf.NAME
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config"), ROUTERS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_router_chooses_and_weighs_as_before(kind: Any, config: Any, dtype: torch.dtype) -> None:
    router, x = filled(kind(config)).to(dtype), torch.randn(200, 32).to(dtype)
    _, weights, experts = router(x)
    swap = router_class(router)
    assert swap is not None
    router.__class__ = swap
    logits, our_weights, our_experts = router(x)
    assert logits.dtype == our_weights.dtype == torch.float32
    assert (our_experts.diff() > 0).all()
    experts, order = experts.sort(1)
    rounded = dtype != torch.float32  # where bf16 logits are rounded, near ones trade places
    same = (experts == our_experts).all(1)
    assert same.float().mean() > 0.9 if rounded else same.all()
    tolerance = 2e-2 if rounded else 1e-5
    theirs = weights.gather(1, order)[same].float()
    torch.testing.assert_close(our_weights[same], theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(our_weights, our_weights.to(weights.dtype).float()), "rounded as the model rounds them"


@pytest.mark.parametrize("change", [{"top_k": 3}, {"norm_topk_prob": False}])
def test_a_router_with_its_own_formula_is_refused(change: dict[str, Any]) -> None:
    class Sharper(Qwen3MoeTopKRouter):
        def forward(self, hidden_states: Tensor) -> Any:
            return super().forward(2 * hidden_states)

    router = filled(Sharper(ROUTERS[0][1]))
    vars(router).update(change)
    with pytest.raises(ValueError, match="chooses or weighs experts in a way that is not known"):
        router_class(router)
    assert router_class(nn.Linear(4, 4)) is None


def run(block: nn.Module, x: Tensor) -> list[Tensor]:
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    out = block(leaf)
    (out * torch.linspace(-1, 1, x.shape[-1])).sum().backward()
    return [out.detach(), leaf.grad, *(p.grad for p in block.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("kind", "config"), BLOCKS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_block_has_the_outputs_and_gradients_of_eager_experts_in_fp64(kind: Any, config: Any) -> None:
    config._experts_implementation = "eager"
    x = torch.randn(2, 30, 32)
    exact = run(filled(kind(config)).double(), x.double())
    ours = run(put_ours(filled(kind(config))), x)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_bits_it_has_alone(dtype: torch.dtype) -> None:
    config = ROUTERS[0][1]
    block = put_ours(filled(Qwen3MoeSparseMoeBlock(config))).to(dtype)
    x = torch.randn(1, 70, 32).to(dtype)
    with torch.no_grad():
        whole = block(x)
        for part in (slice(0, 1), slice(3, 30), slice(69, 70)):
            assert torch.equal(block(x[:, part]), whole[:, part])
        assert torch.equal(block(x.flip(1)), whole.flip(1))
        assert torch.equal(block(x.view(2, 35, 32)).view_as(whole), whole)


def experts(**changes: Any) -> nn.Module:
    module = filled(Qwen3MoeSparseMoeBlock(ROUTERS[0][1])).experts
    vars(module).update(changes)
    return module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_bias": True}, "Qwen3MoeExperts has has_bias=True, which is not supported"),
        ({"is_transposed": True}, "is_transposed=True"),
        ({"is_concatenated": False}, "is_concatenated=False"),
        ({"has_gate": False}, "has_gate=False"),
        ({"limit": 7.0}, "clamps gate and up to 7, which is not supported"),
    ],
)
def test_experts_of_another_form_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.experts_forward(experts(**changes), torch.zeros(2, 32), torch.zeros(2, 1).long(), torch.ones(2, 1))


def test_another_activation_is_refused() -> None:
    module = experts()
    module.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="GELU; only SiLU experts are supported"):
        hf.experts_forward(module, torch.zeros(2, 32), torch.zeros(2, 1).long(), torch.ones(2, 1))


def test_the_order_of_the_choice_does_not_matter_and_other_ranks_experts_are_left_out() -> None:
    torch.manual_seed(0)
    module, x = experts(), torch.randn(20, 32)
    index, weights = torch.rand(20, 16).topk(4, dim=1).indices, torch.rand(20, 4)
    out = hf.experts_forward(module, x, index, weights)
    order = torch.rand(20, 4).argsort(1)
    assert torch.equal(hf.experts_forward(module, x, index.gather(1, order), weights.gather(1, order)), out)
    away = index.clone()
    away[:, 2] = 16  # what transformers writes for an expert on another rank
    assert torch.equal(
        hf.experts_forward(module, x, away, weights),
        hf.experts_forward(module, x, index[:, [0, 1, 3]], weights[:, [0, 1, 3]]),
    )
