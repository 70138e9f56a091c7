"""RoPE kernel against fp64 and its CPU twin, on contiguous heads and on views of a fused projection."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn, relative_error, same_bits
from torch import Tensor

from vexact.ops.cpu.rotary import rope as twin
from vexact.ops.kernels.rotary import rope as kernel
from vexact.ops.rotary.rope import rope_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def table(rows: int, head_dim: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(rows)[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)


def inputs(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = randn(11, heads[0], head_dim, seed=1, dtype=dtype)
    k = randn(11, heads[1], head_dim, seed=2, dtype=dtype)
    positions = torch.tensor([0, 1, 2, 40, 99, 0, 1, 7, 7, 63, 64], device=DEVICE)
    return q, k, positions, table(100, head_dim)


@pytest.mark.parametrize(("heads", "head_dim"), [((16, 8), 128), ((9, 3), 64), ((3, 1), 40), ((2, 2), 96)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_matches_fp64_and_the_twin(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    arguments = inputs(dtype, heads, head_dim)
    with poisoned_outputs():
        outputs = kernel.forward(*arguments, False)
    expected = twin.forward(*(argument.cpu() for argument in arguments), False)
    for output, source, twin_output in zip(outputs, arguments[:2], expected):
        reference = rope_reference(source, arguments[2], arguments[3])
        assert relative_error(output, reference) < TOLERANCE[dtype]
        assert same_bits(output.cpu(), twin_output)


def test_inverse_undoes_the_rotation_and_is_its_gradient() -> None:
    q, k, positions, cos_sin = inputs(torch.float32, (4, 2), 64)
    rotated = kernel.forward(q, k, positions, cos_sin, False)
    for back, source in zip(kernel.forward(*rotated, positions, cos_sin, True), (q, k)):
        assert relative_error(back, source) < 1e-6
    wide = q.double().requires_grad_()
    dq = randn(*q.shape, seed=9)
    rope_reference(wide, positions, cos_sin).backward(dq.double())
    assert relative_error(kernel.forward(dq, k, positions, cos_sin, True)[0], wide.grad) < 1e-6


def test_views_of_a_fused_projection_are_read_in_place() -> None:
    q, k, positions, cos_sin = inputs(torch.bfloat16, (4, 2), 64)
    fused = torch.cat((q.flatten(1), k.flatten(1), randn(11, 128, seed=3, dtype=torch.bfloat16)), dim=1)
    q_view, k_view = fused[:, :256].view(11, 4, 64), fused[:, 256:384].view(11, 2, 64)
    for view, plain in zip(
        kernel.forward(q_view, k_view, positions, cos_sin, False), kernel.forward(q, k, positions, cos_sin, False)
    ):
        assert view.is_contiguous()
        assert same_bits(view, plain)


def test_transposed_heads_are_accepted() -> None:
    q, k, positions, cos_sin = inputs(torch.bfloat16, (4, 2), 64)
    moved = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(
        kernel.forward(moved, k, positions, cos_sin, False)[0], kernel.forward(q, k, positions, cos_sin, False)[0]
    )


def test_a_token_does_not_depend_on_its_batch() -> None:
    q, k, positions, cos_sin = inputs(torch.bfloat16, (9, 3), 64)
    together = kernel.forward(q, k, positions, cos_sin, False)
    for token in range(11):
        here = slice(token, token + 1)
        alone = kernel.forward(q[here], k[here], positions[here], cos_sin, False)
        assert all(same_bits(one, many[here]) for one, many in zip(alone, together))


def test_a_position_outside_the_table_gives_nan() -> None:
    q, k, positions, cos_sin = inputs(torch.float32, (2, 1), 40)
    positions[3], positions[6] = 100, -1
    q_out, k_out = kernel.forward(q, k, positions, cos_sin, False)
    bad = torch.zeros(11, dtype=torch.bool, device=DEVICE)
    bad[[3, 6]] = True
    for output in (q_out, k_out):
        assert torch.equal(output.isnan().all(2).all(1), bad)
        assert torch.equal(output.isnan().any(2).any(1), bad)
