"""Fused linear cross-entropy kernels: the sampler's bits, the gradients of fp64, in every chunking."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from linear_support import DEVICE, randn, tensor_core  # noqa: F401
from torch import Tensor

from vexact.ops.kernels import linear, linear_cross_entropy, logprob

BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {BF16: 6e-3, FP32: 2e-6}


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    inv_temperature: Tensor
    min_logit: Tensor


def make_case(tokens: int, size: int, vocabulary: int, dtype: torch.dtype) -> Case:
    """Random rows; every second one is truncated to about half of the vocabulary."""
    hidden = randn(tokens, size, seed=1, dtype=dtype)
    weight = randn(vocabulary, size, seed=2, dtype=dtype, scale=0.3)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)
    inv_temperature = (torch.rand(tokens, generator=generator) + 0.5).to(DEVICE)
    logits = linear.forward(hidden, weight, None, FP32)
    min_logit = torch.full((tokens,), float("-inf"), device=DEVICE)
    min_logit[::2] = torch.minimum(logits.median(1).values, logits.gather(1, targets[:, None])[:, 0])[::2]
    return Case(hidden, weight, targets, inv_temperature, min_logit)


def small_chunks(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    """Limits at which a few dozen tokens take several chunks, groups and vocabulary slices."""
    monkeypatch.setattr(linear_cross_entropy, "ROW_MULTIPLE", 16)
    monkeypatch.setattr(linear_cross_entropy, "COLUMN_MULTIPLE", 64)
    monkeypatch.setattr(linear_cross_entropy, "WORKSPACE_BYTES", 64 * 4 * 36)
    monkeypatch.setattr(linear_cross_entropy, "ONE_PASS_LOGITS_BYTES", 16 * 4 * (vocabulary + 16))
    monkeypatch.setattr(linear_cross_entropy, "ONE_PASS_GRADIENT_BYTES", 32 * 4 * (vocabulary + 16))


def fp64_gradients(case: Case, dlogprobs: Tensor, dentropy: Tensor | None) -> tuple[Tensor, Tensor]:
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    dropped = linear.forward(case.hidden, case.weight, None, FP32) < case.min_logit[:, None]
    z = (hidden @ weight.T * case.inv_temperature.double()[:, None]).masked_fill(dropped, -1e30)
    log_p = torch.log_softmax(z, 1)
    loss = (log_p.gather(1, case.targets[:, None])[:, 0] * dlogprobs.double()).sum()
    if dentropy is not None:
        loss = loss - ((log_p.exp() * log_p.masked_fill(dropped, 0.0)).sum(1) * dentropy.double()).sum()
    return torch.autograd.grad(loss, (hidden, weight))


def assert_close(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, exact in zip(ours, reference, strict=True):
        assert (mine.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize(("dtype", "vocabulary"), [(BF16, 73), (BF16, 272), (FP32, 73)])
def test_forward_has_the_bits_of_linear_and_token_logprobs(dtype, vocabulary, monkeypatch):
    case = make_case(36, 32, vocabulary, dtype)
    small_chunks(monkeypatch, vocabulary)
    fused = linear_cross_entropy.forward(*case)
    for start, count in ((0, 1), (3, 18)):
        part = Case(*(tensor if tensor is case.weight else tensor[start : start + count] for tensor in case))
        logits = linear.forward(part.hidden, part.weight, None, FP32)
        alone = logprob.token_logprobs(logits, part.targets, part.inv_temperature, part.min_logit)
        for whole, single in zip(fused, alone, strict=True):
            assert torch.equal(whole[start : start + count].view(torch.int32), single.view(torch.int32))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("dtype", "vocabulary"), [(BF16, 73), (BF16, 200), (FP32, 73)])
def test_backward_matches_fp64(dtype, vocabulary, with_entropy, monkeypatch):
    case = make_case(20, 32, vocabulary, dtype)
    small_chunks(monkeypatch, vocabulary)
    dlogprobs, dentropy = randn(20, seed=4), randn(20, seed=5) if with_entropy else None
    _, lse, entropy = linear_cross_entropy.forward(*case)
    ours = linear_cross_entropy.backward(dlogprobs, dentropy, *case, lse, entropy)
    assert [gradient.dtype for gradient in ours] == [dtype, dtype]
    assert_close(ours, fp64_gradients(case, dlogprobs, dentropy), TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "vocabulary"), [(BF16, 73), (BF16, 136), (FP32, 73)])
def test_one_pass_agrees_with_forward_and_backward(dtype, vocabulary, monkeypatch):
    case = make_case(36, 32, vocabulary, dtype)
    scale = randn(36, seed=4)

    def dloss(logprobs: Tensor, tokens: slice) -> Tensor:
        return scale[tokens] * logprobs.exp()

    logprobs, lse, entropy = linear_cross_entropy.forward(*case)
    at_once = linear_cross_entropy.one_pass(*case, dloss)
    small_chunks(monkeypatch, vocabulary)
    chunked = linear_cross_entropy.one_pass(*case, dloss)
    gradients = linear_cross_entropy.backward(dloss(logprobs, slice(None)), None, *case, lse, entropy)
    exact = fp64_gradients(case, dloss(logprobs, slice(None)), None)
    for result in (at_once, chunked):
        assert torch.equal(result[0].view(torch.int32), logprobs.view(torch.int32))
        assert torch.equal(result[1].view(torch.int32), entropy.view(torch.int32))
        assert_close(result[2:], exact, TOLERANCE[dtype])
        assert_close(gradients, exact, TOLERANCE[dtype])


def test_the_epilogue_and_the_stored_logits_give_the_same_gradients(monkeypatch):
    case = make_case(20, 32, 136, BF16)
    _, lse, entropy = linear_cross_entropy.forward(*case)
    arguments = (randn(20, seed=4), randn(20, seed=5), *case, lse, entropy)
    fused = linear_cross_entropy.backward(*arguments)
    monkeypatch.setattr(linear_cross_entropy, "_fuses_epilogue", lambda hidden, weight: False)
    stored = linear_cross_entropy.backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(fused, stored, strict=True))
    assert torch.equal(linear_cross_entropy.forward(*case)[1], lse)


def test_expanded_gradients_are_read_as_vectors():
    case = make_case(20, 32, 73, BF16)
    _, lse, entropy = linear_cross_entropy.forward(*case)
    one = torch.ones(1, device=DEVICE).expand(20)
    expanded = linear_cross_entropy.backward(one, one, *case, lse, entropy)
    dense = linear_cross_entropy.backward(one.contiguous(), one.contiguous(), *case, lse, entropy)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_no_tokens():
    case = make_case(4, 32, 73, BF16)
    empty = Case(*(tensor if tensor is case.weight else tensor[:0] for tensor in case))
    logprobs, lse, entropy = linear_cross_entropy.forward(*empty)
    assert logprobs.shape == (0,)
    dhidden, dweight = linear_cross_entropy.backward(logprobs, None, *empty, lse, entropy)
    assert dhidden.shape == (0, 32)
    assert not dweight.any()
    assert not linear_cross_entropy.one_pass(*empty, lambda values, tokens: values)[3].any()


def test_chunk_sizes():
    assert linear_cross_entropy.balanced_size(16384, 2300, 128) == 2048
    assert linear_cross_entropy.balanced_size(100, 40, 16) == 32
    assert linear_cross_entropy.balanced_size(5, 1, 16) == 16
    assert [(part.start, part.stop) for part in linear_cross_entropy.cut(70, 32)] == [(0, 32), (32, 64), (64, 70)]
    assert list(linear_cross_entropy.cut(0, 32)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [151936, 49152, 1003])
def test_bits_and_gradients_on_the_gpu(vocabulary):
    case = make_case(1500, 256, vocabulary, BF16)
    fused = linear_cross_entropy.forward(*case)
    for count in (1, 17, 64, 200, 1500):
        logits = linear.forward(case.hidden[:count], case.weight, None, FP32)
        alone = logprob.token_logprobs(
            logits, case.targets[:count], case.inv_temperature[:count], case.min_logit[:count]
        )
        for whole, single in zip(fused, alone, strict=True):
            assert torch.equal(whole[:count].view(torch.int32), single.view(torch.int32))
    dlogprobs, dentropy = randn(1500, seed=4), randn(1500, seed=5)
    ours = linear_cross_entropy.backward(dlogprobs, dentropy, *case, *fused[1:])
    again = linear_cross_entropy.backward(dlogprobs, dentropy, *case, *fused[1:])
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert_close(ours, fp64_gradients(case, dlogprobs, dentropy), 6e-3)
    one_pass = linear_cross_entropy.one_pass(*case, lambda values, tokens: dlogprobs[tokens])
    assert torch.equal(one_pass[0], fused[0])
    assert_close(one_pass[2:], fp64_gradients(case, dlogprobs, None), 6e-3)
