import pytest
import torch

from vexact.ops import linear
from vexact.ops.linear import linear_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), [(128, 256), (100, 73), (576, 49)])
def test_a_row_has_the_same_bits_in_every_batch(dtype, k, n):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(200, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    full = linear(x, weight, bias)
    for start, rows in ((0, 1), (3, 2), (5, 7), (31, 1), (31, 2), (32, 32), (17, 33), (9, 130)):
        assert torch.equal(linear(x[start : start + rows], weight, bias), full[start : start + rows])
    shuffled = torch.randperm(200)
    assert torch.equal(linear(x[shuffled], weight, bias), full[shuffled])


def test_an_output_column_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    x, q, k = torch.randn(7, 64), torch.randn(48, 64), torch.randn(16, 64)
    fused = linear(x, torch.cat((q, k)))
    assert torch.equal(fused, torch.cat((linear(x, q), linear(x, k)), dim=1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_close_to_fp64(dtype, tolerance):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 96).to(dtype), torch.randn(40, 96).to(dtype), torch.randn(40).to(dtype)
    expected = linear_reference(x, weight, bias)
    assert (linear(x, weight, bias) - expected).norm() <= tolerance * expected.norm()


def test_logits_of_low_precision_inputs_are_not_rounded():
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(30, 64).bfloat16()
    logits = linear(x, weight, out_dtype=torch.float32)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert torch.equal(logits.bfloat16(), linear(x, weight))


def test_gradients_match_fp64():
    torch.manual_seed(0)
    inputs = [torch.randn(37, 20), torch.randn(11, 20), torch.randn(11)]
    ours = [t.clone().requires_grad_() for t in inputs]
    wide = [t.double().requires_grad_() for t in inputs]
    dy = torch.randn(37, 11)
    linear(*ours).backward(dy)
    linear_reference(*wide).backward(dy.double())
    for a, b in zip(ours, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


def test_mismatching_shapes_and_dtypes_are_named():
    with pytest.raises(ValueError, match=r"K=8 but weight is \(4, 7\)"):
        linear(torch.zeros(2, 8), torch.zeros(4, 7))
    with pytest.raises(ValueError, match="cast one of them"):
        linear(torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.bfloat16))
