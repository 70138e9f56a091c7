"""Heads of latent attention: kernel and operator have the bits, and the gradients, of rope and torch's copies."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn, same_bits
from torch import Tensor

from vexact.ops import latent_rope, rope, stock
from vexact.ops.cpu.rotary import latent_rope as twin
from vexact.ops.kernels.rotary import latent_rope as kernel
from vexact.ops.rotary.latent_rope import rotated_and_joined

POSITIONS = torch.tensor([0, 1, 2, 40, 99, 0, 63])
# heads, plain, rotated
SIZES = [(16, 128, 64), (3, 24, 8), (9, 20, 6), (1, 1, 2)]


def inputs(dtype: torch.dtype, heads: int, plain: int, rotated: int) -> tuple[Tensor, ...]:
    """As the projections leave them: views of wider rows."""
    tokens, width = len(POSITIONS), heads * (plain + rotated)
    first = randn(tokens, width + 5 + rotated, seed=1, dtype=dtype)
    expanded = randn(tokens, heads, plain + 7, seed=2, dtype=dtype)
    q, _, k_rotated = first.split((width, 5, rotated), dim=1)
    angles = torch.arange(100)[:, None] * 100.0 ** (-torch.arange(0, rotated, 2) / rotated)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)
    return q.unflatten(1, (heads, -1)), expanded[..., :plain], k_rotated, POSITIONS.to(DEVICE), table


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_the_parts(dtype, sizes, interleaved):
    arguments = inputs(dtype, *sizes)
    with poisoned_outputs():
        found = kernel.forward(*arguments, interleaved)
    expected = twin.forward(*(argument.cpu() for argument in arguments), interleaved)
    plain = rotated_and_joined(rope, *arguments, interleaved)
    for output, twin_output, parts in zip(found, expected, plain, strict=True):
        assert output.is_contiguous()
        assert same_bits(output.cpu(), twin_output)
        assert same_bits(output, parts)


def test_a_token_does_not_depend_on_its_batch_nor_on_strides():
    arguments = inputs(torch.bfloat16, 9, 20, 6)
    *heads, positions, table = arguments
    together = kernel.forward(*arguments, True)
    moved = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in heads]
    assert all(same_bits(*pair) for pair in zip(kernel.forward(*moved, positions, table, True), together))
    for token in range(len(positions)):
        here = slice(token, token + 1)
        alone = kernel.forward(*(x[here] for x in heads), positions[here], table, True)
        assert all(same_bits(one, many[here]) for one, many in zip(alone, together))


def test_a_position_outside_the_table_gives_nan():
    *heads, positions, table = inputs(torch.float32, 3, 24, 8)
    positions = positions.clone()
    positions[2], positions[4] = 100, -1
    for output in kernel.forward(*heads, positions, table, True):
        assert output.isnan().all(2).all(1).logical_not().all()
        assert output[..., 24:].isnan().all(2).all(1).tolist() == [False, False, True, False, True, False, False]
        assert not output[..., :24].isnan().any()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_bits_of_autograd(dtype, interleaved):
    *heads, positions, table = (argument.cpu() for argument in inputs(dtype, 9, 20, 6))
    weights = [torch.randn(7, 9, 26, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (3, 4)]
    results = []
    for fused in (True, False):
        leaves = [x.detach().clone().requires_grad_() for x in heads]
        arguments = *leaves, positions, table, interleaved
        outputs = latent_rope(*arguments) if fused else rotated_and_joined(rope, *arguments)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


def test_the_stock_operator_agrees():
    arguments = [argument.cpu() for argument in inputs(torch.float32, 3, 24, 8)]
    for one, other in zip(stock.latent_rope(*arguments, True), latent_rope(*arguments, True), strict=True):
        torch.testing.assert_close(one, other)


def test_refusals():
    q, k_plain, k_rotated, positions, table = (argument.cpu() for argument in inputs(torch.float32, 3, 24, 8))
    with pytest.raises(
        ValueError, match=r"latent_rope: q is \(7, 3, 32\), k_plain \(7, 3, 23\) and k_rotated \(7, 8\)"
    ):
        latent_rope(q, k_plain[..., 1:], k_rotated, positions, table, True)
    with pytest.raises(ValueError, match=r"k_rotated is 8 wide and cos_sin \(100, 7\)"):
        latent_rope(q, k_plain, k_rotated, positions, table[:, 1:], True)
    with pytest.raises(ValueError, match=r"cos_sin is torch.float64"):
        latent_rope(q, k_plain, k_rotated, positions, table.double(), True)
    with pytest.raises(ValueError, match=r"positions is torch.int32"):
        latent_rope(q, k_plain, k_rotated, positions.int(), table, True)
    with pytest.raises(ValueError, match=r"k_rotated is \(7, 1, 8\), expected \(T, R\)"):
        latent_rope(q, k_plain, k_rotated.unsqueeze(1), positions, table, True)
    with pytest.raises(ValueError, match=r"positions holds 100"):
        latent_rope(q, k_plain, k_rotated, positions + 100 - positions, table, True)
