"""What the tests of the fused linear cross-entropy share: inputs and exact gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from linear_support import DEVICE, randn
from torch import Tensor

from vexact.ops.kernels import linear

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 6e-3, FP16: 8e-4, FP32: 2e-6}


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
