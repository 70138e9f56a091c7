"""The log-prob kernels: close to fp64, and the same bits for a row wherever it lies."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn
from torch import Tensor

from vexact.ops.kernels import logprob
from vexact.ops.logprob import token_logprobs_reference

INFINITY = float("inf")


def rows(batch: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, tokens, inverse temperatures, thresholds: every second row is truncated to half of its vocabulary."""
    logits = randn(batch, vocabulary, seed=1, scale=5.0)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocabulary, (batch,), generator=generator).to(DEVICE)
    inv_temperature = (torch.rand(batch, generator=generator) + 0.5).to(DEVICE)
    min_logit = torch.full((batch,), -INFINITY, device=DEVICE)
    min_logit[::2] = torch.minimum(logits.median(1).values, logits.gather(1, tokens[:, None])[:, 0])[::2]
    return logits, tokens, inv_temperature, min_logit


@pytest.mark.parametrize(("batch", "vocabulary"), [(3, 1), (3, 40), (4, 73), (3, 5000), (2, 49152)])
def test_close_to_fp64(batch, vocabulary):
    inputs = rows(batch, vocabulary)
    with poisoned_outputs():
        results = logprob.token_logprobs(*inputs)
    for ours, reference in zip(results, token_logprobs_reference(*inputs), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=2e-7, atol=5e-6)


@pytest.mark.gpu
def test_close_to_fp64_at_the_full_vocabulary():
    inputs = rows(300, 151936)
    for ours, reference in zip(logprob.token_logprobs(*inputs), token_logprobs_reference(*inputs), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=2e-7, atol=5e-6)


@pytest.mark.parametrize("programs", [8, 16, 64])
def test_bits_depend_on_the_row_alone(programs, monkeypatch):
    inputs = rows(5, 1000)
    expected = logprob.token_logprobs(*inputs)
    monkeypatch.setattr(logprob, "BLOCKS_PER_PROGRAM", programs)
    wider = torch.full((5, 1013), float("nan"), device=DEVICE)
    wider[:, 5:1005] = inputs[0]  # another stride, another alignment, poison on both sides
    moved = logprob.token_logprobs(wider[:, 5:1005], *inputs[1:])
    alone = [logprob.token_logprobs(*(part[row : row + 1] for part in inputs)) for row in range(5)]
    for index, whole in enumerate(expected):
        assert torch.equal(moved[index].view(torch.int32), whole.view(torch.int32))
        assert torch.equal(torch.cat([one[index] for one in alone]), whole)


def test_a_block_order_of_its_own_would_be_noticed():
    logits, *rest = rows(40, 1000)
    reversed_tokens = 999 - rest[0]
    turned = logprob.token_logprobs(logits.flip(1), reversed_tokens, *rest[1:])
    assert not torch.equal(turned[1], logprob.token_logprobs(logits, *rest)[1])


def test_one_kept_token_has_probability_one():
    logits, _, inv_temperature, _ = rows(4, 200)
    logprobs, _, entropy = logprob.token_logprobs(logits, logits.argmax(1), inv_temperature, logits.max(1).values)
    assert logprobs.abs().max() <= 1e-6
    assert torch.equal(entropy, torch.zeros(4, device=DEVICE))


def test_a_token_below_its_threshold_is_kept():
    """Under other weights than those that sampled it: alone, beside others, and where the temperature is low."""
    logits, tokens, _, _ = rows(6, 200)
    ordered = logits.sort(1, descending=True)
    tokens[:] = ordered.indices[:, 9]
    min_logit = ordered.values[:, 4].clone()
    min_logit[::2] = ordered.values[::2, 0] + 1e-3
    inv_temperature = torch.tensor([1.0, 1.0, 0.5, 2.0, 1e3, 1e3], device=DEVICE)
    inputs = logits, tokens, inv_temperature, min_logit
    ours = logprob.token_logprobs(*inputs)
    for one, reference in zip(ours, token_logprobs_reference(*inputs), strict=True):
        torch.testing.assert_close(one.double(), reference, rtol=2e-6, atol=1e-5)
    assert (ours[0] <= 0).all()
    assert (ours[0][::2].abs() <= 1e-6).all()


def test_impossible_tokens_and_broken_logits_are_nan():
    logits, tokens, inv_temperature, min_logit = rows(4, 200)
    tokens[0], tokens[1] = 200, -1
    logits[2, 7] = float("nan")
    logprobs = logprob.token_logprobs(logits, tokens, inv_temperature, min_logit)[0]
    assert logprobs.isnan().tolist() == [True, True, True, False]


def test_logits_of_minus_infinity_count_as_absent():
    logits, tokens, inv_temperature, _ = rows(3, 130)
    everything = torch.full((3,), -INFINITY, device=DEVICE)
    padded = torch.cat((logits, torch.full((3, 70), -INFINITY, device=DEVICE)), dim=1)
    for ours, same in zip(
        logprob.token_logprobs(padded, tokens, inv_temperature, everything),
        token_logprobs_reference(logits, tokens, inv_temperature, everything),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), same, rtol=2e-7, atol=5e-6)


def test_expanded_vectors_are_read_as_vectors():
    logits, tokens, _, _ = rows(4, 73)
    one, none = torch.ones(1, device=DEVICE).expand(4), torch.full((1,), -INFINITY, device=DEVICE).expand(4)
    dense = logprob.token_logprobs(logits, tokens, one.contiguous(), none.contiguous())
    assert torch.equal(logprob.token_logprobs(logits, tokens, one, none)[0], dense[0])
