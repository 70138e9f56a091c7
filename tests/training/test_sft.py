"""The supervised warm-up."""

import pytest
import torch
from training_support import tiny_model

from vexact.training import OptimConfig, SupervisedConfig, supervised_steps

PAIRS = [((1, a, b), ((a + b) % 10 + 10, 2)) for a in range(3, 8) for b in range(3, 8)]


def test_warm_up_learns_the_answers_and_is_reproducible():
    config = SupervisedConfig(batch_size=8, optim=OptimConfig(lr=1e-2, weight_decay=0.0))
    first, second = tiny_model(), tiny_model()
    losses = supervised_steps(first, PAIRS, 40, config)
    assert losses[0] > 2.0
    assert losses[-1] < 0.5 * losses[0]
    assert supervised_steps(second, PAIRS, 40, config) == losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in first.parameters())


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="no \\(prompt, answer\\) pairs"):
        supervised_steps(tiny_model(), [], 1, SupervisedConfig())
