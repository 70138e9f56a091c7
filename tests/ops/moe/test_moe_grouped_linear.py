"""Products by expert: the bits of ``linear``, whoever else chose the expert; gradients; what has no rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vexact.ops import ExpertGroups, group_tokens, grouped_linear, linear, stock
from vexact.ops.moe.grouped_linear import grouped_linear_reference

SHAPES = [(8, 64, 48), (5, 17, 33), (3, 1031, 24), (4, 16, 130)]  # E, N, K


def choices(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Distinct experts, ascending, the first ones more often; the last one never, if that is possible."""
    generator = torch.Generator().manual_seed(seed)
    usable = max(top_k, num_experts - 1)
    popularity = torch.arange(usable).flip(0) * 0.3
    return (torch.rand(tokens, usable, generator=generator) + popularity).topk(top_k, 1).indices.sort(1).values.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_a_row_has_the_bits_of_linear(num_experts: int, n: int, k: int, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, k).to(dtype), torch.randn(num_experts, n, k).to(dtype)
    experts = choices(tokens, 2, num_experts)
    groups = group_tokens(experts, num_experts)
    dense = torch.stack([linear(x, matrix) for matrix in weight], dim=1)  # (T, E, N)
    expected = dense.gather(1, experts.long().unsqueeze(2).expand(-1, -1, n)).flatten(0, 1)[groups.rows.long()]
    assert torch.equal(grouped_linear(x, weight, groups, gather=True), expected)
    places = x[groups.rows.long() // 2]
    assert torch.equal(grouped_linear(places, weight, groups, gather=False), expected)
    columns = torch.empty(k, tokens, dtype=dtype).T.copy_(x)
    matrices = torch.empty(num_experts, k, n, dtype=dtype).transpose(1, 2).copy_(weight)
    assert not (columns.is_contiguous() and matrices.is_contiguous()) or tokens == 1
    assert torch.equal(grouped_linear(columns, matrices, groups, gather=True), expected)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_experts", "n", "k"), SHAPES)
def test_gradients_are_those_of_fp64(num_experts: int, n: int, k: int, gather: bool, padded: bool) -> None:
    torch.manual_seed(0)
    groups = _groups(40, num_experts, padded)
    x = torch.randn(40 if gather else 80, k).requires_grad_()
    weight = torch.randn(num_experts, n, k).requires_grad_()
    dy = torch.randn(80, n)
    dy[int(groups.offsets[-1]) :] = 0  # what stands there means nothing
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    for fn, inputs in ((grouped_linear, (x, weight)), (grouped_linear_reference, wide)):
        out = fn(*inputs, groups, gather=gather)
        (out * dy).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), wide[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), wide[1].grad, rtol=1e-4, atol=1e-4)
    assert not weight.grad[-1].any()  # nobody chose it
    assert weight.grad[0].any()


def _groups(tokens: int, num_experts: int, padded: bool) -> ExpertGroups:
    experts = choices(tokens, 2, num_experts)
    if padded:
        experts[::3] = -1
        experts[1, 0] = -1
    return group_tokens(experts, num_experts)


def test_padding_is_read_by_nobody() -> None:
    """Rows of tokens without experts are NaN, as are the places past the last one and their gradient."""
    torch.manual_seed(0)
    groups, taken = _groups(40, 8, padded=True), 0
    taken = int(groups.offsets[-1])
    x, weight = torch.randn(40, 16), torch.randn(8, 32, 16).requires_grad_()
    x[(groups.slots < 0).all(1)] = float("nan")
    x.requires_grad_()
    out = grouped_linear(x, weight, groups, gather=True)
    assert out[:taken].isfinite().all()
    dy = torch.ones_like(out)
    dy[taken:] = float("nan")
    dx, dweight = torch.autograd.grad(out, (x, weight), dy)
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    assert not dx[(groups.slots < 0).all(1)].any()


@pytest.mark.parametrize("gather", [True, False])
def test_no_tokens_no_rows_and_no_gradient(gather: bool) -> None:
    groups = group_tokens(torch.empty(0, 2, dtype=torch.int32), 4)
    x, weight = torch.empty(0, 8, requires_grad=True), torch.randn(4, 6, 8, requires_grad=True)
    out = grouped_linear(x, weight, groups, gather=gather)
    assert out.shape == (0, 6)
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert dx.shape == (0, 8)
    assert not dweight.any()


def test_the_gradient_of_a_token_adds_its_experts_in_order() -> None:
    """Three places of 1e8, 1 and -1e8: only left to right in fp32 gives 0."""
    weight = torch.tensor([1e8, 1.0, -1e8]).view(3, 1, 1)
    groups = group_tokens(torch.tensor([[0, 1, 2]], dtype=torch.int32), 3)
    x = torch.ones(1, 1, requires_grad=True)
    grouped_linear(x, weight, groups, gather=True).sum().backward()
    assert x.grad.item() == 0.0


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_the_stock_product_is_close(gather: bool, padded: bool) -> None:
    torch.manual_seed(0)
    groups = _groups(40, 8, padded)
    x, weight = torch.randn(40 if gather else 80, 16), torch.randn(8, 32, 16)
    results = []
    for fn in (grouped_linear, stock.grouped_linear):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = fn(*inputs, groups, gather=gather)[: int(groups.offsets[-1])]
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
