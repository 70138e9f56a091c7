import pytest
import torch

from vexact.ops import (
    linear,
    linear_cross_entropy,
    linear_cross_entropy_one_pass,
    linear_cross_entropy_trained,
    token_logprobs,
)
from vexact.ops.cpu import linear_cross_entropy as cpu_lce
from vexact.ops.logprob import token_logprobs_reference


def _case(num_tokens=50, hidden=24, vocab=73, truncate=True):
    torch.manual_seed(0)
    x, weight = torch.randn(num_tokens, hidden), torch.randn(vocab, hidden)
    logits = linear(x, weight, out_dtype=torch.float32)
    threshold = logits.sort(dim=-1).values[:, vocab // 3] if truncate else torch.full((num_tokens,), float("-inf"))
    targets = logits.argsort(dim=-1)[torch.arange(num_tokens), torch.randint(vocab // 3, vocab, (num_tokens,))]
    return x, weight, targets, torch.rand(num_tokens) + 0.5, threshold, logits


@pytest.mark.parametrize("truncate", [False, True])
def test_matches_fp64(truncate):
    *_, targets, inv_temperature, min_logit, logits = _case(truncate=truncate)
    ours = token_logprobs(logits, targets, inv_temperature, min_logit)
    expected = token_logprobs_reference(logits, targets, inv_temperature, min_logit)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


def test_entropy_survives_logits_far_apart():
    logits = torch.tensor([[0.0, -1e30, -200.0, float("-inf")]])
    stats = token_logprobs(logits, torch.tensor([0]), torch.ones(1), torch.full((1,), float("-inf")))
    assert stats.logprobs.item() == 0.0
    assert stats.entropy.item() == 0.0


def test_a_row_has_the_same_bits_in_every_batch_and_on_both_sides(monkeypatch):
    x, weight, targets, inv_temperature, min_logit, logits = _case()
    sampler = token_logprobs(logits, targets, inv_temperature, min_logit)
    for rows in (slice(0, 1), slice(3, 9), slice(7, 50)):
        part = token_logprobs(logits[rows], targets[rows], inv_temperature[rows], min_logit[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, sampler, strict=True))
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(cpu_lce, "LOGITS_PER_CHUNK", chunk * 73)
        trainer = linear_cross_entropy(x, weight, targets, inv_temperature, min_logit)
        assert torch.equal(trainer.logprobs, sampler.logprobs)
        assert torch.equal(trainer.entropy, sampler.entropy)


@pytest.mark.parametrize("truncate", [False, True])
def test_gradients_match_fp64_over_chunks(monkeypatch, truncate):
    monkeypatch.setattr(cpu_lce, "LOGITS_PER_CHUNK", 16 * 73)
    x, weight, targets, inv_temperature, min_logit, _ = _case(truncate=truncate)
    ours, wide = [t.clone().requires_grad_() for t in (x, weight)], [t.double().requires_grad_() for t in (x, weight)]
    a, b = torch.randn(50), torch.randn(50)
    out = linear_cross_entropy(*ours, targets, inv_temperature, min_logit)
    (out.logprobs * a + out.entropy * b).sum().backward()
    logits = wide[0] @ wide[1].T
    kept = linear(x, weight) >= min_logit.unsqueeze(1)
    logp = torch.log_softmax((logits * inv_temperature.double().unsqueeze(1)).masked_fill(~kept, -1e9), dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    (logp.gather(1, targets.unsqueeze(1)).squeeze(1) * a + entropy * b).sum().backward()
    for ours_, wide_ in zip(ours, wide, strict=True):
        torch.testing.assert_close(ours_.grad.double(), wide_.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inv_temperature", [1.0, 1000.0])
@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_token_below_its_threshold_is_kept(kept, inv_temperature):
    """The threshold is of the weights that sampled. Under others a token may lie below, even with all the rest."""
    x, weight, *_, logits = _case()
    ordered = logits.sort(dim=-1, descending=True)
    targets, inverse = ordered.indices[:, 30].contiguous(), torch.full((50,), inv_temperature)
    min_logit = ordered.values[:, kept - 1].contiguous() if kept else ordered.values[:, 0] + 1e-3
    ours, wide = [t.clone().requires_grad_() for t in (x, weight)], [t.double().requires_grad_() for t in (x, weight)]
    out = linear_cross_entropy(*ours, targets, inverse, min_logit)
    (out.logprobs + out.entropy).sum().backward()
    z = wide[0] @ wide[1].T * inv_temperature
    outside = (logits < min_logit.unsqueeze(1)).scatter(1, targets.unsqueeze(1), False)
    logp = torch.log_softmax(z.masked_fill(outside, -1e9), dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    (chosen + entropy).sum().backward()
    torch.testing.assert_close(out.logprobs.double(), chosen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-3, atol=1e-5)
    assert (out.logprobs <= 0).all()
    assert kept or not out.logprobs.any()
    for ours_, wide_ in zip(ours, wide, strict=True):
        torch.testing.assert_close(ours_.grad.double(), wide_.grad, rtol=1e-3, atol=1e-4 * inv_temperature)


def test_one_pass_agrees_with_the_general_form():
    x, weight, targets, inv_temperature, min_logit, _ = _case()
    advantages, old = torch.randn(50), -torch.rand(50)
    general = [t.clone().requires_grad_() for t in (x, weight)]
    out = linear_cross_entropy(*general, targets, inv_temperature, min_logit)
    (-advantages * torch.exp(out.logprobs - old)).sum().backward()
    fused = linear_cross_entropy_one_pass(
        x, weight, targets, lambda lp, t: -advantages[t] * torch.exp(lp - old[t]), inv_temperature, min_logit
    )
    assert torch.equal(fused.logprobs, out.logprobs)
    torch.testing.assert_close(fused.dhidden, general[0].grad)
    torch.testing.assert_close(fused.dweight, general[1].grad)


def test_trained_form_is_the_one_pass_form_inside_autograd():
    x, weight, targets, inv_temperature, min_logit, _ = _case()
    advantages = torch.randn(50)
    rows = targets, lambda logprobs, t: -advantages[t] * logprobs.exp(), inv_temperature, min_logit
    expected = linear_cross_entropy_one_pass(x, weight, *rows)
    source, leaf = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_cross_entropy_trained(source * 1.0, leaf, *rows)
    assert torch.equal(out.logprobs, expected.logprobs)
    assert torch.equal(out.entropy, expected.entropy)
    assert not out.logprobs.requires_grad
    (4.0 * out.surrogate).backward()  # a power of two scales without rounding
    assert torch.equal(source.grad, 4.0 * expected.dhidden)
    assert torch.equal(leaf.grad, 4.0 * expected.dweight)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="must stay fp32"):
        token_logprobs(torch.zeros(1, 4).bfloat16(), torch.zeros(1).long(), torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"targets is \(3,\), expected \(2,\)"):
        linear_cross_entropy(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(3).long())
