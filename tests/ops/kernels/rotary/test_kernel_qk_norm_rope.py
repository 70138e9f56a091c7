"""Fused per-head norm and rotation: against fp64, its CPU twin, and itself in other batches and layouts."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn, relative_error, same_bits
from torch import Tensor

from vexact.ops.cpu.rotary import qk_norm_rope as twin
from vexact.ops.kernels.rotary import qk_norm_rope as kernel
from vexact.ops.rotary.qk_norm_rope import qk_norm_rope_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
EPS = 1e-6
SHAPES = [((16, 8), 128), ((9, 3), 64), ((3, 1), 40), ((2, 2), 96)]


def arguments(dtype: torch.dtype, heads: tuple[int, int], head_dim: int, tokens: int = 11) -> list[Tensor | float]:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(100)[:, None] * frequencies[None, :]
    q, k = (randn(tokens, count, head_dim, seed=count, dtype=dtype, scale=3.0) for count in heads)
    weights = [randn(head_dim, seed=seed, dtype=dtype) for seed in (3, 4)]
    positions = (torch.arange(tokens) * 37 % 100).to(DEVICE)
    return [q, k, *weights, EPS, positions, torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)]


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_matches_fp64_and_the_twin(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    given = arguments(dtype, heads, head_dim)
    with poisoned_outputs():
        outputs = kernel.forward(*given)
    expected = twin.forward(*(a.cpu() if isinstance(a, Tensor) else a for a in given))
    for output, source, weight in zip(outputs[:2], given[:2], given[2:4]):
        reference = qk_norm_rope_reference(source, weight, EPS, *given[5:])
        assert relative_error(output, reference) < TOLERANCE[dtype]
    for output, other in zip(outputs, expected):
        assert relative_error(output.cpu(), other) < TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES[:2])
def test_a_token_has_the_same_bits_alone_and_in_a_fused_projection(heads: tuple[int, int], head_dim: int) -> None:
    q, k, *weights, eps, positions, table = arguments(torch.bfloat16, heads, head_dim)
    together = kernel.forward(q, k, *weights, eps, positions, table)
    widths = [count * head_dim for count in (*heads, heads[1])]
    fused = torch.cat([q.flatten(1), k.flatten(1), k.flatten(1) * float("nan")], dim=1)
    views = [part.unflatten(1, (-1, head_dim)) for part in fused.split(widths, dim=1)][:2]
    for one, other in zip(together, kernel.forward(*views, *weights, eps, positions, table)):
        assert same_bits(one, other)
    for token in (0, 4, 10):
        rows = slice(token, token + 1)
        alone = kernel.forward(q[rows], k[rows], *weights, eps, positions[rows], table)
        for one, other in zip(together, alone):
            assert same_bits(one[rows], other)


def test_rows_that_are_not_aligned_or_adjacent_are_copied() -> None:
    q, k, *rest = arguments(torch.bfloat16, (4, 2), 32)
    expected = kernel.forward(q, k, *rest)
    shifted = torch.zeros(11, 4 * 32 + 3, dtype=q.dtype, device=DEVICE)
    shifted[:, 3:] = q.flatten(1)
    spread = k.transpose(0, 1).contiguous().transpose(0, 1)
    for one, other in zip(expected, kernel.forward(shifted[:, 3:].unflatten(1, (4, 32)), spread, *rest)):
        assert same_bits(one, other)


@pytest.mark.parametrize("heads", range(1, 9))
@pytest.mark.parametrize("head_dim", [4, 8, 12, 20, 64])
def test_a_compiled_kernel_is_told_the_same_of_the_rows_wherever_they_lie(heads: int, head_dim: int) -> None:
    """Whether 16 divides the stride decides the layout, and so the order of additions."""
    own = torch.zeros(3, heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    for others in range(5):
        wide = torch.zeros(3, heads + others, head_dim, dtype=torch.bfloat16, device=DEVICE)
        for tokens in (1, 3):
            read = kernel.readable(wide[:tokens, :heads])
            assert (read.stride(0) % 16 == 0) == (own.stride(0) % 16 == 0)
            assert read.stride()[1:] == own.stride()[1:]
            if own.stride(0) % 16 == wide.stride(0) % 16 == 0:
                assert read.data_ptr() == wide.data_ptr()  # the usual widths are not copied


def test_a_position_outside_the_table_gives_nan() -> None:
    *given, positions, table = arguments(torch.float32, (2, 1), 32)
    positions[3], positions[5] = 100, -1
    for output in kernel.forward(*given, positions, table)[:2]:
        outside = torch.tensor([3, 5], device=DEVICE)
        assert output[outside].isnan().all()
        assert output.isfinite().all(-1).all(-1).sum() == 9
