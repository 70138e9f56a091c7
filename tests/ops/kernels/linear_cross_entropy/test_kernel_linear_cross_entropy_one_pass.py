"""The one-pass form: the forward's bits, and gradients through rounded exponentials as good as those of fp32 logits."""

from __future__ import annotations

import pytest
import torch
from cross_entropy_support import BF16, FP16, FP32, TOLERANCE, Case, assert_close, fp64_gradients, make_case
from linear_support import DEVICE, randn, tensor_core  # noqa: F401
from torch import Tensor

from vexact.ops.kernels import linear, linear_cross_entropy
from vexact.ops.kernels.linear_cross_entropy import launch, single_pass
from vexact.ops.kernels.linear_cross_entropy.chunks import padded

UNIT_ROUNDOFF = {BF16: 2.0**-8, FP16: 2.0**-11}


def store_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a GPU without the fused epilogue does."""
    monkeypatch.setattr(launch, "fuses_epilogue", lambda hidden, weight: False)


def small_groups(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Limits at which 36 tokens take two groups, and the first of them two chunks."""
    monkeypatch.setattr(single_pass, "ROW_MULTIPLE", 16)
    part = 21 if launch.fuses_epilogue(case.hidden, case.weight) else 2
    gradients = 32 * padded(case.weight.shape[0]) * case.hidden.element_size()
    monkeypatch.setattr(single_pass, "WORKSPACE_BYTES", gradients * part // (part - 1) + part)
    assert single_pass.group_and_chunk(case.hidden, case.weight) == (32, 16)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "vocabulary"), [(BF16, 73), (BF16, 328), (FP16, 136), (FP32, 73)])
def test_bits_of_the_forward_and_gradients_of_fp64(dtype, vocabulary, fused, monkeypatch):
    case = make_case(36, 32, vocabulary, dtype)
    scale = randn(36, seed=4)

    def dloss(logprobs: Tensor, tokens: slice) -> Tensor:
        return scale[tokens] * logprobs.exp()

    logprobs, lse, entropy = linear_cross_entropy.forward(*case)
    general = linear_cross_entropy.backward(dloss(logprobs, slice(None)), None, *case, lse, entropy)
    exact = fp64_gradients(case, dloss(logprobs, slice(None)), None)
    if not fused:
        store_logits(monkeypatch)
    at_once = linear_cross_entropy.one_pass(*case, dloss)
    small_groups(monkeypatch, case)
    for result in (at_once, linear_cross_entropy.one_pass(*case, dloss)):
        assert torch.equal(result[0].view(torch.int32), logprobs.view(torch.int32))
        assert torch.equal(result[1].view(torch.int32), entropy.view(torch.int32))
        assert [gradient.dtype for gradient in result[2:]] == [dtype, dtype]
        assert_close(result[2:], exact, TOLERANCE[dtype])
        for mine, theirs, reference in zip(result[2:], general, exact, strict=True):
            assert (mine.double() - reference).norm() <= 2 * (theirs.double() - reference).norm()


def chunk_gradients(case: Case, slope: Tensor) -> Tensor:
    """Gradients of all logits (T, V), fp32, for a loss whose derivative by the log-probs is ``slope``."""
    out = torch.empty(len(slope), padded(case.weight.shape[0]), dtype=case.hidden.dtype, device=DEVICE)
    out = out[:, : case.weight.shape[0]]
    single_pass.chunk_gradients(*case, lambda values, at: slope[at], slice(None), out)
    return out.float()


def exact_gradients(case: Case, slope: Tensor) -> Tensor:
    """What ``chunk_gradients`` approximates, (T, V) fp64, from the fp32 logits."""
    logits = linear.forward(case.hidden, case.weight, None, FP32)
    z = (logits.double() * case.inv_temperature.double()[:, None]).masked_fill(logits < case.min_logit[:, None], -1e30)
    p = torch.softmax(z, 1)
    # 1 - p of the target, without cancellation.
    others = p.scatter(1, case.targets[:, None], 0.0)
    grad = (-others).scatter(1, case.targets[:, None], others.sum(1, keepdim=True))
    return grad * (slope * case.inv_temperature).double()[:, None]


def confident_case(dtype: torch.dtype) -> Case:
    """Targets of probability 1/2 to nearly 1, in a vocabulary of several tiles."""
    case = make_case(36, 32, 328, dtype)
    weight = case.weight.clone()
    weight[case.targets] += case.hidden / case.hidden.float().pow(2).sum(1, keepdim=True).to(dtype) * 9
    return case._replace(weight=weight, inv_temperature=case.inv_temperature + 0.5)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("confident", [False, True])
def test_each_gradient_is_off_by_at_most_twice_what_stored_logits_give(dtype, confident, monkeypatch):
    case = confident_case(dtype) if confident else make_case(36, 32, 328, dtype)
    slope = randn(36, seed=4)
    exact = exact_gradients(case, slope)
    fused = chunk_gradients(case, slope)
    store_logits(monkeypatch)
    stored = chunk_gradients(case, slope)

    target = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, case.targets[:, None], True)
    scale = (slope * case.inv_temperature).abs().double()[:, None]
    # One rounding of the gradient, the fp32 rounding of z and lse, and the spacing of fp16 close to 0.
    bound = exact.abs() * UNIT_ROUNDOFF[dtype] + exact.abs() * 2.0**-16 + scale * target * 2.0**-20
    bound += 2.0**-25 * torch.maximum(scale, torch.ones_like(scale)) if dtype is FP16 else 0.0
    assert ((stored - exact).abs() <= bound).all()
    assert ((fused - exact).abs() <= 2 * bound).all()
    # The target's gradient comes from its fp32 log-prob, not from a rounded exponential.
    assert ((fused - exact).abs() <= bound)[target].all()
    assert (fused - exact).norm() <= 2 * (stored - exact).norm()
    if confident:
        assert (exact[target].abs() < 0.01 * slope.abs()).any()


def test_dropped_blocks_rows_and_targets(monkeypatch):
    case = make_case(6, 32, 328, BF16)
    logits = linear.forward(case.hidden, case.weight, None, FP32)
    min_logit = logits.topk(3, dim=1).values[:, 2]  # most blocks of 64 columns keep nothing
    targets = logits.argmax(1)
    targets[1:3] = logits.argmin(1)[1:3]
    min_logit[2] = float("inf")
    case = case._replace(targets=targets, min_logit=min_logit)
    slope = randn(6, seed=4)
    fused = chunk_gradients(case, slope)
    store_logits(monkeypatch)
    stored = chunk_gradients(case, slope)
    assert torch.equal(fused != 0, stored != 0)
    assert ((fused != 0).sum(1) == torch.tensor([3, 4, 0, 3, 3, 3], device=DEVICE)).all()
    torch.testing.assert_close(fused, stored, rtol=2.0**-7, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_no_tokens(fused, monkeypatch):
    case = make_case(4, 32, 73, BF16)
    empty = Case(*(tensor if tensor is case.weight else tensor[:0] for tensor in case))
    if not fused:
        store_logits(monkeypatch)
    logprobs, entropy, dhidden, dweight = linear_cross_entropy.one_pass(*empty, lambda values, tokens: values)
    assert logprobs.shape == entropy.shape == (0,)
    assert dhidden.shape == (0, 32)
    assert dweight.shape == (73, 32)
    assert not dweight.any()


def test_the_workspace_is_bounded(monkeypatch):
    hidden, weight = (torch.empty(size, 2048, dtype=BF16, device="meta") for size in (16384, 151936))
    returned = hidden.nbytes + 2 * weight.nbytes  # dhidden, and dweight in fp32

    def peak(group: int, chunk: int, chunk_bytes_per_token: int) -> int:
        return returned + group * 151936 * 2 + chunk * chunk_bytes_per_token

    states = 12 * 151936 // 64  # three fp32 values per block
    assert single_pass.group_and_chunk(hidden, weight) == (4096, 2048)
    assert peak(4096, 2048, states) <= 2.45 * 2**30
    store_logits(monkeypatch)
    assert single_pass.group_and_chunk(hidden, weight) == (2048, 1024)
    assert peak(2048, 1024, states + 4 * 151936) <= 2.45 * 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [151936, 49152, 1003])
def test_bits_and_gradients_on_the_gpu(vocabulary, monkeypatch):
    case = make_case(1500, 256, vocabulary, BF16)
    slope = randn(1500, seed=4)
    logprobs = linear_cross_entropy.forward(*case)[0]
    exact = fp64_gradients(case, slope, None)
    for groups in (1, 3):
        monkeypatch.setattr(single_pass, "WORKSPACE_BYTES", 2 * padded(vocabulary) * 1536 // groups * 21 // 20 + 21)
        result = linear_cross_entropy.one_pass(*case, lambda values, tokens: slope[tokens])
        again = linear_cross_entropy.one_pass(*case, lambda values, tokens: slope[tokens])
        assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
        assert torch.equal(result[0], logprobs)
        assert_close(result[2:], exact, TOLERANCE[BF16])
