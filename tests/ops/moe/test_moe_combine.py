"""The sum of a token's expert rows: its order, its fused multiply-adds, its gradient."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from vexact.ops import combine, group_tokens, stock
from vexact.ops.cpu.fma import fma
from vexact.ops.moe.combine import combine_reference


def nearest_fp32(exact: Fraction) -> float:
    """Round to nearest, ties to even, by rational arithmetic."""
    guess = np.float32(float(exact))  # rounded twice, so at most one step off
    around = [np.nextafter(guess, np.float32(d), dtype=np.float32) for d in (-np.inf, np.inf)]
    candidates = [guess, *around]
    even = {c: int(c.view(np.int32)) & 1 for c in candidates}
    return float(min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), even[c])))


def hard_cases() -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers of near exponents, and sums a hair beside the middle between two fp32 numbers."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1500, generator=generator) for _ in range(2))
    c = torch.randn(1500, generator=generator) * 2.0 ** torch.randint(-40, 40, (1500,), generator=generator)
    whole = torch.randint(2**23, 2**24, (600,), generator=generator).float()
    half = torch.tensor([0.5, -0.5]).repeat(300)
    # (1 + 2^-k) (1/2 ± 2^-j): products whose tail decides on which side of the middle the sum lies
    tail = 2.0 ** -torch.randint(1, 24, (600,), generator=generator).float()
    beside = half * (1 + (torch.randint(-1, 2, (600,), generator=generator)) * 2.0**-23)
    tiny = torch.randn(300, generator=generator) * 2.0**-70
    return (
        torch.cat((a, 1 + tail * 2.0**-8, tiny, tiny)),
        torch.cat((b, beside, tiny.flip(0), tiny.abs() * 2.0**-60)),
        torch.cat((c, whole, torch.zeros(300), torch.full((300,), 2.0**-126))),
    )


def test_multiply_adds_are_rounded_once() -> None:
    cases = hard_cases()
    ours = fma(*cases)
    twice = (cases[0].double() * cases[1].double() + cases[2].double()).float()
    for a, b, c, result in zip(*(t.tolist() for t in (*cases, ours)), strict=True):
        assert result == nearest_fp32(Fraction(a) * Fraction(b) + Fraction(c)), (a, b, c)
    assert not torch.equal(ours, twice), "no case tells one rounding from two"
    assert not torch.equal(ours, cases[0] * cases[1] + cases[2])


def test_multiply_adds_of_what_is_no_number() -> None:
    inf, nan, big = float("inf"), float("nan"), 3e38
    cases = [(inf, 1, 0, inf), (inf, 0, 1, nan), (nan, 1, 1, nan), (big, big, 0, inf), (big, 2, -big, big)]
    *abc, expected = torch.tensor([*cases, (inf, 1, -inf, nan), (-big, 2, 0, -inf)]).unbind(1)
    torch.testing.assert_close(fma(*abc), expected, rtol=0, atol=0, equal_nan=True)
    assert not fma(torch.tensor(-1.0), torch.tensor(0.0), torch.tensor(0.0)).signbit()


def inputs(dtype: torch.dtype = torch.float32, padded: bool = False) -> tuple:
    torch.manual_seed(0)
    experts = torch.rand(30, 8).argsort(1)[:, :3].sort(1).values.int()
    if padded:
        experts[::4] = -1
        experts[1::4, 1] = -1
    groups = group_tokens(experts, 8)
    return torch.randn(90, 20).to(dtype), torch.rand(30, 3), groups, torch.randn(30, 20).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_shared", [False, True])
def test_the_sum_is_a_chain_of_multiply_adds(dtype: torch.dtype, padded: bool, with_shared: bool) -> None:
    y, weights, groups, shared = inputs(dtype, padded)
    y[int(groups.offsets[-1]) :] = float("nan")
    out = combine(y, weights, groups, shared if with_shared else None)
    for token in range(30):
        acc = torch.zeros(20)
        for weight, slot in zip(weights[token], groups.slots[token].tolist(), strict=True):
            if slot >= 0:
                acc = fma(weight, y[slot].float(), acc)
        if with_shared:
            acc = acc + shared[token].float()
        assert torch.equal(out[token], acc.to(dtype))
    expected = combine_reference(y, weights, groups, shared if with_shared else None)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_order_is_that_of_the_experts() -> None:
    groups = group_tokens(torch.tensor([[0, 1, 2]], dtype=torch.int32), 3)
    y = torch.tensor([[1e8], [1.0], [-1e8]])
    assert combine(y, torch.ones(1, 3), groups).item() == 0.0
    assert combine(y[[0, 2, 1]], torch.ones(1, 3), groups).item() == 1.0
    assert combine(y, torch.ones(1, 3), groups, torch.ones(1, 1)).item() == 1.0  # shared experts come last


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_fp64(padded: bool) -> None:
    y, weights, groups, shared = inputs(padded=padded)
    dout = torch.randn(30, 20)
    leaves = [t.clone().requires_grad_() for t in (y, weights, shared)]
    wide = [t.double().requires_grad_() for t in (y, weights, shared)]
    for fn, (y_, weights_, shared_) in ((combine, leaves), (combine_reference, wide)):
        fn(y_, weights_, groups, shared_).backward(dout.to(y_.dtype))
    for ours, exact in zip(leaves, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_low_precision_gradients_are_rounded_once() -> None:
    y, weights, groups, _ = inputs(torch.bfloat16)
    y.requires_grad_()
    dout = torch.randn(30, 20).bfloat16()
    (dy,) = torch.autograd.grad(combine(y, weights, groups), y, dout)
    exact = weights.unsqueeze(2) * dout.float().unsqueeze(1)  # (T, k, H)
    assert torch.equal(dy[groups.slots.long()], exact.bfloat16())


def test_nothing_to_add() -> None:
    none = group_tokens(torch.empty(0, 2, dtype=torch.int32), 4)
    assert combine(torch.empty(0, 6), torch.empty(0, 2), none).shape == (0, 6)
    padding = group_tokens(torch.full((2, 1), -1, dtype=torch.int32), 4)
    shared = torch.randn(2, 6)
    assert not combine(torch.full((2, 6), float("nan")), torch.ones(2, 1), padding).any()
    assert torch.equal(combine(torch.full((2, 6), float("nan")), torch.ones(2, 1), padding, shared), shared)


def test_strided_inputs_are_read_as_they_are() -> None:
    y, weights, groups, shared = inputs()
    expected = combine(y, weights, groups, shared)
    strided = [torch.empty(t.T.shape).T.copy_(t) for t in (y, weights, shared)]
    assert torch.equal(combine(strided[0], strided[1], groups, strided[2]), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_the_stock_sum_is_close(padded: bool) -> None:
    y, weights, groups, shared = inputs(padded=padded)
    torch.testing.assert_close(stock.combine(y, weights, groups, shared), combine(y, weights, groups, shared))
