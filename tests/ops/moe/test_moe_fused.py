"""The operators that do two steps at once give the bits of the two, with and without gradients."""

from __future__ import annotations

import pytest
import torch

from vexact import ops
from vexact.ops import stock

SETTINGS = {"top_k": 2, "scoring": "sigmoid", "num_groups": 4, "top_groups": 2, "scale": 2.5, "salt": 3}


def layer(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(9, 24).to(dtype), torch.randn(9, 8), torch.randn(8, 20, 24).to(dtype), torch.randn(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gather", [True, False])
def test_grouped_swiglu_is_both_of_its_steps(dtype, gather):
    x, logits, weight, _ = layer(dtype)
    groups = ops.group_tokens(ops.route(logits, top_k=2).experts, 8)
    if not gather:
        x = x[groups.rows.long() // 2]
    grads = []
    for fused in (True, False):
        x_, weight_ = (tensor.clone().requires_grad_() for tensor in (x, weight))
        if fused:
            out = ops.grouped_swiglu(x_, weight_, groups, gather=gather)
        else:
            out = ops.swiglu(ops.grouped_linear(x_, weight_, groups, gather=gather))
        grads.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), (x_, weight_))))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(ops.grouped_swiglu(x, weight, groups, gather=gather), grads[0][0])


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("padded", [None, (1, 4, 8), range(9)])
@pytest.mark.parametrize("of", [ops, stock])
def test_route_and_group_is_both_of_its_steps(of, padded, gradient):
    _, logits, _, bias = layer(torch.float32)
    logits.requires_grad_(gradient)
    digests = torch.zeros(2, 9, dtype=torch.int64)
    padding = None if padded is None else torch.zeros(9, dtype=torch.bool).index_fill_(0, torch.tensor(padded), True)
    routes, groups = of.route_and_group(logits, bias, digest=digests[0], padding=padding, **SETTINGS)
    expected = of.route(logits, bias, digest=digests[1], **SETTINGS)
    experts = expected.experts.clone()
    experts[list(padded or ())] = -1
    for one, other in zip((*routes, *groups), (*expected, *of.group_tokens(experts, 8)), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(digests[0], digests[1])
    assert routes.weights.requires_grad == gradient


def test_refusals_name_the_operator():
    x, logits, weight, _ = layer(torch.float32)
    routes, groups = ops.route_and_group(logits, top_k=2)
    assert routes.experts.shape == (9, 2)
    with pytest.raises(ValueError, match="grouped_swiglu: weight has 19 rows per expert"):
        ops.grouped_swiglu(x, weight[:, :19], groups, gather=True)
    with pytest.raises(ValueError, match="grouped_swiglu: x has K=23"):
        ops.grouped_swiglu(x[:, :23], weight, groups, gather=True)
    with pytest.raises(ValueError, match="route_and_group: top_k=9"):
        ops.route_and_group(logits, top_k=9)
    with pytest.raises(ValueError, match=r"route_and_group: padding is \(8,\), expected \(9,\)"):
        ops.route_and_group(logits, top_k=2, padding=torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"route_and_group: padding is torch.int64, expected torch.bool"):
        ops.route_and_group(logits, top_k=2, padding=torch.zeros(9, dtype=torch.int64))
