"""Sampling kernels: the generator against published vectors, the kept set against sorting, the draw against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn, same_bits
from sampling_probe import gumbel, philox
from torch import Tensor

from vexact.ops.cpu import sampling as twin
from vexact.ops.kernels.launches import forget
from vexact.ops.kernels.sampling import draw as kernel
from vexact.ops.kernels.sampling.threshold import THRESHOLD_CONFIG

INF = float("inf")


def philox_reference(words: np.ndarray) -> np.ndarray:
    """Philox4x32-10 in uint64 arithmetic, from the paper: (N, 6) counter and key words -> (N, 4)."""
    c = [words[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = words[:, 4].astype(np.uint64), words[:, 5].astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ k0,
            product1 & low,
            (product0 >> np.uint64(32)) ^ c[3] ^ k1,
            product0 & low,
        ]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=1).astype(np.int64)


def noise_reference(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """fp32 Gumbel noise of one row, in the bit layout the package documents."""
    index = np.arange(-(-vocab_size // 4))
    halves = [position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF, 0, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    words = np.column_stack([index, *(np.full_like(index, half) for half in halves)])
    bits = philox_reference(words).reshape(-1)[:vocab_size]
    u = ((bits >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    return -np.log(-np.log(u))


def row_values(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def kept_reference(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The kept set of one row (V,), by sorting in fp64; ties at a threshold are kept."""
    row = logits.double().cpu()
    z = row / temperature
    kept = torch.ones_like(row, dtype=torch.bool)
    if top_k > 0:
        kept &= row >= row.sort(descending=True).values[min(top_k, len(row)) - 1]
    if top_p < 1:
        p = torch.softmax(z.masked_fill(~kept, -INF), 0)
        ordered, order = p.sort(descending=True)
        reached = int((ordered.cumsum(0) < top_p).sum())
        kept &= row >= row[order[min(reached, int(kept.sum()) - 1)]]
    if min_p > 0:
        kept &= z - z.max() >= np.log(min_p)
    return kept


def test_philox_known_answers() -> None:
    """Vectors of the authors' Random123 library for philox4x32-10."""
    ones = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    output = philox(torch.tensor([[0] * 6, [ones] * 6, pi], device=DEVICE))
    assert [[f"{word:08x}" for word in row] for row in output.tolist()] == [
        ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"],
        ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"],
        ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
    ]


def test_philox_matches_wide_arithmetic() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (1024, 6))
    output = philox(torch.from_numpy(words).to(DEVICE))
    assert np.array_equal(output.cpu().numpy(), philox_reference(words))


def test_noise_is_finite_and_accurate_at_both_ends() -> None:
    bits = torch.tensor([0, 1 << 9, 2**31, 2**32 - 1, 2**32 - 1024, 12345678, 511, 2**32 - 513], device=DEVICE)
    u = ((bits >> 9).double() + 0.5) * 2.0**-23
    expected = -torch.log(-torch.log(u))
    assert torch.allclose(gumbel(bits).double(), expected, rtol=1e-6, atol=1e-6)


FILTERS = [
    (1.0, 1, 1.0, 0.0),
    (1.0, 50, 1.0, 0.0),
    (0.7, 5000, 1.0, 0.0),
    (1.0, -1, 0.9, 0.0),
    (0.6, -1, 0.3, 0.0),
    (1.0, -1, 0.9999, 0.0),
    (1.0, -1, 1e-6, 0.0),
    (1.0, -1, 0.0, 0.0),
    (1.3, -1, 1.0, 0.05),
    (1.0, -1, 1.0, 1.0),
    (0.8, 20, 0.8, 0.0),
    (0.8, 200, 0.95, 0.1),
    (1.0, 7, 0.99999, 0.001),
]


@pytest.mark.parametrize("vocab_size", [73, 5001])
@pytest.mark.parametrize("scale", [0.01, 4.0])
def test_kept_set_matches_sorting(vocab_size: int, scale: float) -> None:
    logits = randn(len(FILTERS), vocab_size, seed=vocab_size, scale=scale)
    temperature, top_k, top_p, min_p = (row_values(*column) for column in zip(*FILTERS))
    with poisoned_outputs():
        inv_temperature, min_logit = kernel.thresholds(logits, temperature, top_k.int(), top_p, min_p)
    assert same_bits(inv_temperature, 1.0 / temperature)
    for row, parameters in enumerate(FILTERS):
        kept = logits[row] >= min_logit[row]
        assert torch.equal(kept.cpu(), kept_reference(logits[row], *parameters)), parameters
        if parameters[1] < vocab_size or parameters[2] < 1 or parameters[3] > 0:
            assert min_logit[row] == logits[row][kept].min()


@pytest.mark.parametrize(
    ("values", "parameters", "expected"),
    [
        ([1.0] * 9, (1.0, 3, 1.0, 0.0), 1.0),  # every token ties: all stay
        ([1.0] * 9, (1.0, -1, 0.1, 0.0), 1.0),
        ([3.0, 2.0, 2.0, 2.0, 1.0], (1.0, 2, 1.0, 0.0), 2.0),  # ties at the k-th place stay
        ([0.0, -0.0, -1.0, -2.0], (1.0, 1, 1.0, 0.0), 0.0),  # -0 and +0 are one value
        ([5.0, -INF, -INF, 4.0], (1.0, 3, 1.0, 0.0), -INF),  # fewer finite logits than k
        ([5.0, -INF, -INF, 4.0], (1.0, -1, 0.999, 0.0), 4.0),
        ([-5.0, -6.0, -3e38, -7.0], (1.0, 2, 0.99, 0.0), -6.0),
        ([1e-40, 0.0, -1e-40, -1.0], (1.0, 2, 1.0, 0.0), 0.0),  # subnormals are ordered too
        ([50.0, 1.0, 0.0, -1.0], (1.0, 4, 0.5, 0.0), 50.0),
        ([2.0], (1.0, -1, 0.5, 0.5), 2.0),
    ],
)
def test_thresholds_of_awkward_rows(values: list[float], parameters: tuple, expected: float) -> None:
    temperature, top_k, top_p, min_p = (row_values(value) for value in parameters)
    _, min_logit = kernel.thresholds(row_values(*values)[None], temperature, top_k.int(), top_p, min_p)
    assert min_logit.item() == expected


def test_rows_without_filters_and_greedy_rows_keep_everything() -> None:
    logits = randn(4, 500, seed=1)
    temperature = row_values(1.0, 0.0, 0.5, 2.0)
    top_k = row_values(0, 3, -1, 500, dtype=torch.int32)
    inv_temperature, min_logit = kernel.thresholds(
        logits, temperature, top_k, row_values(1.0, 0.1, 1.0, 1.0), row_values(0.0, 0.9, 0.0, 0.0)
    )
    assert min_logit.tolist() == [-INF] * 4
    assert inv_temperature.tolist() == [1.0, 1.0, 2.0, 0.5]


def draw(logits: Tensor, temperature: float, min_logit: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    rows = torch.full((len(logits),), temperature, device=DEVICE)
    return kernel.draw(logits, rows, 1.0 / rows if temperature else rows + 1, min_logit, seed, position)


@pytest.mark.parametrize("vocab_size", [5, 73, 9001])
def test_draw_is_the_argmax_of_logits_plus_noise(vocab_size: int) -> None:
    logits = randn(6, vocab_size, seed=3)
    seed = row_values(0, 1, -1, 2**62 + 5, 12345678901234, 7, dtype=torch.int64)
    position = row_values(0, 1, 2**40 + 3, 17, 2**31, 5, dtype=torch.int64)
    min_logit = logits.median(dim=1).values
    with poisoned_outputs():
        tokens = draw(logits, 0.5, min_logit, seed, position)
    for row in range(6):
        noise = noise_reference(int(seed[row]), int(position[row]), vocab_size)
        score = logits[row].cpu().numpy() * np.float32(2.0) + noise
        score[(logits[row] < min_logit[row]).cpu().numpy()] = -np.inf
        # One-ulp differences between logarithms can only exchange scores that are equal to six digits.
        assert score[tokens[row].item()] >= score.max() - 1e-5
        assert DEVICE == "cuda" or tokens[row].item() == score.argmax()


def test_greedy_takes_the_lowest_of_the_largest() -> None:
    logits = randn(3, 9001, seed=4)
    logits[0, [8999, 123, 4500]] = 50.0
    logits[1, [0, 9000]] = 50.0
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tokens = draw(logits, 0.0, torch.full((3,), -INF, device=DEVICE), zeros, zeros)
    assert tokens.tolist() == [123, 0, int(logits[2].argmax())]


def test_rows_without_a_finite_score_still_give_a_valid_token() -> None:
    logits = torch.full((2, 300), -INF, device=DEVICE)
    logits[1] = float("nan")
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert draw(logits, 1.0, torch.full((2,), -INF, device=DEVICE), zeros, zeros).tolist() == [0, 0]


def test_a_row_does_not_depend_on_its_batch_or_on_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(6, 2101, seed=5)
    parameters = (
        row_values(1.0, 0.7, 0.0, 1.0, 1.5, 1.0),
        row_values(-1, 40, 0, 0, 3, 900, dtype=torch.int32),
        row_values(1.0, 0.9, 1.0, 0.5, 1.0, 0.95),
        row_values(0.0, 0.0, 0.0, 0.0, 0.1, 0.0),
    )
    seed, position = torch.arange(6, device=DEVICE) * 2**35, torch.arange(6, device=DEVICE)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        inv_temperature, min_logit = kernel.thresholds(logits[rows], *(p[rows] for p in parameters))
        return min_logit, kernel.draw(
            logits[rows], parameters[0][rows], inv_temperature, min_logit, seed[rows], position[rows]
        )

    min_logit, tokens = run(slice(None))
    for row in (0, 1, 5):
        alone_min_logit, alone_token = run(slice(row, row + 1))
        assert same_bits(alone_min_logit, min_logit[row : row + 1])
        assert alone_token.item() == tokens[row].item()
    monkeypatch.setitem(THRESHOLD_CONFIG, "BLOCK", 512)
    monkeypatch.setitem(kernel.DRAW_CONFIG, "CHUNK", 512)
    monkeypatch.setitem(kernel.DRAW_CONFIG, "BLOCK", 256)
    forget()
    split_min_logit, split_tokens = run(slice(None))
    assert same_bits(split_min_logit, min_logit)
    assert torch.equal(split_tokens, tokens)


def test_noise_makes_the_draws_follow_the_softmax() -> None:
    """Pearson's chi-square of 4096 draws from 6 tokens; 20.5 is its 0.999 quantile at 5 degrees of freedom."""
    logits = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5])
    count = 4096
    position, index = torch.arange(count).repeat_interleave(2), torch.arange(2).repeat(count)
    words = torch.stack((index, position, index * 0, index * 0, index * 0 + 99, index * 0), dim=1)
    noise = gumbel(philox(words.to(DEVICE)).flatten()).cpu().view(count, 8)[:, :6]
    expected = torch.softmax(logits.double(), 0) * count
    observed = torch.bincount((logits + noise).argmax(1), minlength=6)
    assert float(((observed - expected) ** 2 / expected).sum()) < 20.5


def test_sample_agrees_with_the_twin() -> None:
    logits = randn(5, 2003, seed=6, scale=2.0)
    arguments = (
        logits,
        row_values(1.0, 0.0, 0.7, 1.0, 1.2),
        row_values(-1, 5, 30, 0, 100, dtype=torch.int32),
        row_values(1.0, 0.2, 1.0, 0.9, 0.8),
        row_values(0.0, 0.5, 0.0, 0.0, 0.02),
        torch.arange(5, device=DEVICE) * 2**33 + 11,
        torch.arange(5, device=DEVICE) + 100,
    )
    tokens, logprobs, min_logit = kernel.sample(*arguments)
    twin_tokens, twin_logprobs, twin_min_logit = twin.sample(*(argument.cpu() for argument in arguments))
    assert torch.equal(tokens.cpu(), twin_tokens)
    assert same_bits(min_logit.cpu(), twin_min_logit)
    assert torch.allclose(logprobs.cpu(), twin_logprobs, rtol=1e-5, atol=1e-5)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == min_logit.dtype == torch.float32


@pytest.mark.parametrize(("vocab_size", "scale"), [(37, 1.0), (37, 20.0), (2003, 0.01), (2003, 4.0)])
def test_draws_and_kept_sets_have_the_twin_s_bits(vocab_size: int, scale: float) -> None:
    """Random filters on rows with and without ties, from nearly uniform to nearly one-hot."""
    count = 500 if DEVICE == "cuda" else 8
    rng = torch.Generator().manual_seed(vocab_size)
    logits = randn(count, vocab_size, seed=vocab_size, scale=scale)
    logits[::2] = (logits[::2] * 2).round() / 2
    temperature, top_p, min_p = (torch.rand(count, generator=rng) for _ in range(3))
    arguments = (
        logits.cpu(),
        torch.where(temperature < 0.1, 0.0, 2 * temperature),
        torch.randint(-1, 50, (count,), generator=rng, dtype=torch.int32),
        torch.where(top_p < 0.3, 1.0, top_p),
        torch.where(min_p < 0.6, 0.0, 0.3 * min_p),
        torch.randint(-(2**62), 2**62, (count,), generator=rng),
        torch.randint(0, 9999, (count,), generator=rng),
    )
    tokens, _, min_logit = kernel.sample(*(argument.to(DEVICE) for argument in arguments))
    twin_tokens, _, twin_min_logit = twin.sample(*arguments)
    assert torch.equal(tokens.cpu(), twin_tokens)
    assert same_bits(min_logit.cpu(), twin_min_logit)


@pytest.mark.gpu
def test_all_noise_has_the_twin_s_bits() -> None:
    from vexact.ops.cpu.sampling.gumbel import gumbel as twin_gumbel

    for first in range(0, 1 << 23, 1 << 20):
        words = torch.arange(first, first + (1 << 20))
        parts = [gumbel(part.to(DEVICE) << 9).cpu() for part in words.split(1 << 12)]
        assert same_bits(torch.cat(parts), torch.from_numpy(twin_gumbel(words.numpy())))
