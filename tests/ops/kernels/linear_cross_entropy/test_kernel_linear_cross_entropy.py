"""Fused linear cross-entropy kernels: the sampler's bits, the gradients of fp64, in every chunking."""

from __future__ import annotations

import pytest
import torch
from cross_entropy_support import BF16, FP32, TOLERANCE, Case, assert_close, fp64_gradients, make_case
from linear_support import DEVICE, randn, tensor_core  # noqa: F401

from vexact.ops.kernels import linear, linear_cross_entropy, logprob
from vexact.ops.kernels.linear_cross_entropy import chunks, launch, two_pass


@pytest.fixture
def small_chunks(monkeypatch):
    """Limits at which a few dozen tokens take several chunks and vocabulary slices."""
    monkeypatch.setattr(two_pass, "ROW_MULTIPLE", 16)
    monkeypatch.setattr(two_pass, "COLUMN_MULTIPLE", 64)
    monkeypatch.setattr(two_pass, "WORKSPACE_BYTES", 64 * 4 * 36)


@pytest.mark.parametrize(("dtype", "vocabulary"), [(BF16, 73), (BF16, 272), (FP32, 73)])
def test_forward_has_the_bits_of_linear_and_token_logprobs(dtype, vocabulary, small_chunks):
    case = make_case(36, 32, vocabulary, dtype)
    fused = linear_cross_entropy.forward(*case)
    for start, count in ((0, 1), (3, 18)):
        part = Case(*(tensor if tensor is case.weight else tensor[start : start + count] for tensor in case))
        logits = linear.forward(part.hidden, part.weight, None, FP32)
        alone = logprob.token_logprobs(logits, part.targets, part.inv_temperature, part.min_logit)
        for whole, single in zip(fused, alone, strict=True):
            assert torch.equal(whole[start : start + count].view(torch.int32), single.view(torch.int32))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("dtype", "vocabulary"), [(BF16, 73), (BF16, 200), (FP32, 73)])
def test_backward_matches_fp64(dtype, vocabulary, with_entropy, small_chunks):
    case = make_case(20, 32, vocabulary, dtype)
    dlogprobs, dentropy = randn(20, seed=4), randn(20, seed=5) if with_entropy else None
    _, lse, entropy = linear_cross_entropy.forward(*case)
    ours = linear_cross_entropy.backward(dlogprobs, dentropy, *case, lse, entropy)
    assert [gradient.dtype for gradient in ours] == [dtype, dtype]
    assert_close(ours, fp64_gradients(case, dlogprobs, dentropy), TOLERANCE[dtype])


def test_the_epilogue_and_the_stored_logits_give_the_same_gradients(monkeypatch):
    case = make_case(20, 32, 136, BF16)
    _, lse, entropy = linear_cross_entropy.forward(*case)
    arguments = (randn(20, seed=4), randn(20, seed=5), *case, lse, entropy)
    fused = linear_cross_entropy.backward(*arguments)
    monkeypatch.setattr(launch, "fuses_epilogue", lambda hidden, weight: False)
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


def test_chunk_sizes():
    assert chunks.balanced_size(16384, 2300, 128) == 2048
    assert chunks.balanced_size(100, 40, 16) == 32
    assert chunks.balanced_size(5, 1, 16) == 16
    assert [(part.start, part.stop) for part in chunks.cut(70, 32)] == [(0, 32), (32, 64), (64, 70)]
    assert list(chunks.cut(0, 32)) == []


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
