import numpy as np
import pytest
import torch

from vexact.ops import SamplingTensors, sample, token_logprobs
from vexact.ops.cpu.sampling.gumbel import gumbel
from vexact.ops.cpu.sampling.philox import philox4x32, random_bits
from vexact.ops.cpu.sampling.portable_math import exp_of_negative, log_of_normal


def _params(num, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, seed=None, position=None):
    return SamplingTensors(
        torch.full((num,), temperature),
        torch.full((num,), top_k, dtype=torch.int32),
        torch.full((num,), top_p),
        torch.full((num,), min_p),
        torch.arange(num) * 7919 - 5 if seed is None else seed,
        torch.full((num,), 3) if position is None else position,
    )


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(word, expected):
    w = np.full(1, word, dtype=np.uint64)
    assert tuple(int(v) for v in philox4x32((w, w, w, w), (w, w))[0]) == expected


def test_random_bits_differ_by_seed_and_position():
    bits = random_bits(np.array([1, 1, 2, -1]), np.array([0, 1, 0, 2**40]), 1001)
    assert bits.max() < 2**23
    assert len({row.tobytes() for row in bits}) == 4
    assert abs(bits.mean() / 2**23 - 0.5) < 0.02


def rounded_once(a, b, c):
    """a * b + c for fp32 arrays: the exact sum, rounded to odd in fp64 so that the second rounding is the only one."""
    product, c = a.astype(np.float64) * np.float64(1) * b, np.float64(1) * c
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & (bits & 1 == 0), bits + towards, bits).view(np.float64).astype(np.float32)


def test_noise_has_the_bits_of_fused_multiply_adds(monkeypatch):
    """All 2^23 values there are, against sums that are rounded once; and the table against computing them."""
    from vexact.ops.cpu.sampling import portable_math

    words = np.arange(1 << 23)
    table = gumbel(words)
    assert np.abs(table + np.log(-np.log((words + 0.5) * 2.0**-23))).max() < 1e-6
    assert np.array_equal(gumbel(words[-40:]).view(np.int32), table[-40:].view(np.int32))
    monkeypatch.setattr(portable_math, "_fma", rounded_once)
    for part in np.split(words, 64):
        u = (part.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
        exact = np.float32(0) - log_of_normal(np.float32(0) - log_of_normal(u))
        assert np.array_equal(exact.view(np.int32), table[part].view(np.int32))


def test_exponentials_are_accurate_and_end_in_zero():
    z = -np.linspace(0, 40, 100_001, dtype=np.float32)
    assert exp_of_negative(z[:1]) == 1.0
    np.testing.assert_allclose(exp_of_negative(z), np.exp(z.astype(np.float64)), rtol=3e-6)
    assert (exp_of_negative(np.array([-1e30, -np.inf], np.float32)) < 2.0**-60).all()


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).repeat(20000, 1)
    tokens = sample(logits, _params(20000, temperature=0.8)).token_ids
    expected = torch.softmax(logits[0] / 0.8, dim=-1) * 20000
    chi2 = ((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum().item()
    assert chi2 < 18.5  # 99.9 % quantile of chi-square with 4 degrees of freedom


def test_a_row_is_drawn_alike_in_every_batch():
    torch.manual_seed(0)
    logits = torch.randn(40, 73)
    params = SamplingTensors(
        torch.rand(40) * (torch.arange(40) % 5 > 0),
        torch.randint(-1, 30, (40,), dtype=torch.int32),
        torch.rand(40) * 0.5 + 0.5,
        torch.rand(40) * 0.1,
        torch.randint(-(2**62), 2**62, (40,)),
        torch.randint(0, 5000, (40,)),
    )
    full = sample(logits, params)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(10, 40)):
        part = sample(logits[rows], SamplingTensors(*(t[rows] for t in params)))
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, full, strict=True))


def test_kept_sets_match_brute_force_and_logprobs_are_renormalised():
    torch.manual_seed(1)
    logits, temperature = torch.randn(60, 40) * 2, 0.7
    for top_k, top_p, min_p in ((5, 1.0, 0.0), (-1, 0.6, 0.0), (-1, 1.0, 0.2), (9, 0.8, 0.05), (1, 0.5, 0.9)):
        out = sample(logits, _params(60, temperature, top_k, top_p, min_p))
        for row in range(60):
            order = logits[row].argsort(descending=True)
            kept = order[: top_k if top_k > 0 else 40]
            probs = torch.softmax(logits[row, kept].double() / temperature, dim=-1)
            mass = torch.cat((torch.zeros(1, dtype=torch.float64), probs.cumsum(0)[:-1]))
            inside = (mass < top_p) & (probs >= min_p * probs[0])
            kept = kept[inside]
            assert out.min_logit[row] == logits[row, kept].min()
            assert out.token_ids[row] in kept
            expected = torch.log_softmax(logits[row, kept].double() / temperature, dim=-1)[kept == out.token_ids[row]]
            torch.testing.assert_close(out.logprobs[row].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_ties_at_the_threshold_are_all_kept():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    draws = {int(sample(logits, _params(1, top_k=2, seed=torch.tensor([s]))).token_ids) for s in range(300)}
    assert draws == {0, 1, 2, 3}


def test_greedy_takes_the_first_maximum_and_reports_temperature_one():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    out = sample(logits, _params(1, temperature=0.0, top_k=1, top_p=0.1))
    everything = torch.full((1,), float("-inf"))
    assert out.token_ids.item() == 1
    assert out.min_logit.item() == float("-inf")
    assert torch.equal(out.logprobs, token_logprobs(logits, out.token_ids, torch.ones(1), everything).logprobs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": torch.ones(1)}, r"temperature is \(1,\), expected \(3,\)"),
        ({"top_k": torch.zeros(3, dtype=torch.int64)}, "top_k is torch.int64, expected torch.int32"),
        ({"min_p": torch.zeros(3, dtype=torch.float64)}, "min_p is torch.float64, expected torch.float32"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is"),
        ({"position": torch.zeros(3, dtype=torch.int32)}, "position is torch.int32, expected torch.int64"),
    ],
)
def test_a_parameter_that_is_not_one_number_a_row_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(3, 8), _params(3)._replace(**changed))
