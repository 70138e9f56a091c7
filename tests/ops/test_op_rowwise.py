import pytest
import torch

from vexact.models.config import RopeConfig
from vexact.models.rotary import cos_sin_table
from vexact.ops import add_rms_norm, embedding, qk_norm_rope, rms_norm, rope, swiglu
from vexact.ops.cpu.reduce import tree_sum
from vexact.ops.rms_norm import rms_norm_reference
from vexact.ops.rotary.rope import rope_reference
from vexact.ops.swiglu import swiglu_reference

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def _assert_rows_do_not_depend_on_batch(fn, *tensors):
    full = fn(*tensors)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 40), slice(1, 50)):
        assert torch.equal(fn(*(t[rows] for t in tensors)), full[rows])


def _assert_gradients(fn, reference, inputs, rtol=1e-4):
    ours = [t.clone().requires_grad_() for t in inputs]
    wide = [t.double().requires_grad_() for t in inputs]
    out = fn(*ours)
    dy = torch.randn_like(out)
    out.backward(dy)
    reference(*wide).backward(dy.double())
    for a, b in zip(ours, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 73, 576])
def test_tree_sum_adds_every_element_once(length):
    x = torch.randint(-50, 50, (5, length)).float()
    assert torch.equal(tree_sum(x), x.sum(-1))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rms_norm(dtype, tolerance):
    torch.manual_seed(0)
    x, weight = torch.randn(50, 96).to(dtype), torch.randn(96).to(dtype)
    expected = rms_norm_reference(x, weight, 1e-6)
    assert (rms_norm(x, weight, 1e-6) - expected).norm() <= tolerance * expected.norm()
    _assert_rows_do_not_depend_on_batch(lambda t: rms_norm(t, weight, 1e-6), x)


def test_rms_norm_of_heads_equals_that_of_rows():
    x, weight = torch.randn(6, 4, 32), torch.randn(32)
    assert torch.equal(rms_norm(x, weight, 1e-6).view(-1, 32), rms_norm(x.view(-1, 32), weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_residual_has_the_bits_of_the_two_ops(dtype):
    x, residual, weight = torch.randn(9, 40).to(dtype), torch.randn(9, 40).to(dtype), torch.randn(40).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, 1e-5))


def test_rms_norm_gradients():
    torch.manual_seed(0)
    _assert_gradients(
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: rms_norm_reference(x, w, 1e-6),
        [torch.randn(8, 24), torch.randn(24)],
    )

    def fused(x, residual, weight):
        normed, total = add_rms_norm(x, residual, weight, 1e-6)
        return normed + 3 * total

    def reference(x, residual, weight):
        return rms_norm_reference(x + residual, weight, 1e-6) + 3 * (x + residual)

    _assert_gradients(fused, reference, [torch.randn(8, 24), torch.randn(8, 24), torch.randn(24)])


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu(dtype, tolerance):
    torch.manual_seed(0)
    x = (4 * torch.randn(50, 74)).to(dtype)
    expected = swiglu_reference(x)
    assert (swiglu(x) - expected).norm() <= tolerance * expected.norm()
    _assert_rows_do_not_depend_on_batch(swiglu, x)
    _assert_gradients(swiglu, swiglu_reference, [torch.randn(8, 24)])


def test_rope_rotates_both_and_inverts_in_backward():
    torch.manual_seed(0)
    table = cos_sin_table(RopeConfig(), 16, 64)
    positions = torch.tensor([0, 5, 63, 5])
    q, k = torch.randn(4, 3, 16), torch.randn(4, 2, 16)
    for out, x in zip(rope(q, k, positions, table), (q, k), strict=True):
        torch.testing.assert_close(out.double(), rope_reference(x, positions, table), rtol=1e-5, atol=1e-6)
    assert torch.equal(rope(q, k, positions, table)[0][0], q[0])
    _assert_gradients(
        lambda a, b: torch.cat(rope(a, b, positions, table), dim=1),
        lambda a, b: torch.cat([rope_reference(t, positions, table) for t in (a, b)], dim=1),
        [q, k],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_qk_norm_and_rope_have_the_bits_of_the_ops_apart(dtype):
    torch.manual_seed(0)
    table, positions = cos_sin_table(RopeConfig(), 16, 64), torch.tensor([0, 5, 63, 5])
    fused = torch.randn(4, 6 * 16).to(dtype)
    weights = [torch.randn(16).to(dtype) for _ in range(2)]
    results = []
    for apart in (False, True):
        leaves = [t.clone().requires_grad_() for t in (fused, *weights)]
        q, k, _ = (part.unflatten(1, (-1, 16)) for part in leaves[0].split([48, 32, 16], dim=1))
        if apart:
            out = rope(rms_norm(q, leaves[1], 1e-6), rms_norm(k, leaves[2], 1e-6), positions, table)
        else:
            out = qk_norm_rope(q, k, *leaves[1:], 1e-6, positions, table)
        dout = torch.cat(out, dim=1) * torch.arange(5).view(5, 1)
        dout.sum().backward()
        results.append([*out, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_qk_norm_rope_names_a_weight_of_another_size():
    q, table = torch.randn(2, 3, 16), torch.zeros(4, 16)
    with pytest.raises(ValueError, match=r"k_weight is \(8,\), expected \(16,\)"):
        qk_norm_rope(q, q, torch.ones(16), torch.ones(8), 1e-6, torch.arange(2), table)


def test_embedding_gradient_sums_repeated_tokens():
    weight = torch.randn(7, 5, requires_grad=True)
    ids = torch.tensor([3, 3, 0, 3])
    out = embedding(ids, weight)
    assert torch.equal(out, weight[ids])
    dy = torch.randn(4, 5)
    out.backward(dy)
    expected = torch.zeros(7, 5)
    expected[3], expected[0] = dy[0] + dy[1] + dy[3], dy[2]
    torch.testing.assert_close(weight.grad, expected)
