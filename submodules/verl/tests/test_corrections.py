"""Importance weights, rejections, their metrics and the loss they make, against verl's own on random samples."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.trainer.ppo.rollout_corr_helper import (
    SUPPORTED_ROLLOUT_RS_OPTIONS,
    compute_rollout_correction_and_rejection_mask,
)

from vexact.algorithms import CorrectionConfig, Rejection, importance_weights, kept_tokens, loss_scales
from vexact.algorithms.losses.aggregate import LOSS_AGG_MODES, Denominators, aggregate
from vexact.config.sections.rollout_correction import RS_OPTIONS, RolloutCorrection

SEQUENCES, LONGEST, NORM = 12, 7, 5
WEIGHT_BOUNDS = ("2.0", "1.0", "0.5_5.0", "0.8_1.25")
K1_BOUNDS, OTHER_BOUNDS = ("0.5_2.0", "1.5", "0.9_1.1"), ("0.001", "0.05", "1")


def ours(given: RolloutCorrection, log_ratio: Tensor, lengths: Tensor) -> tuple[CorrectionConfig, Tensor, Tensor, dict]:
    """The configuration, weights (T,), kept tokens (T,) and metrics of packed samples."""
    lower, upper = given.weight_bounds()
    config = CorrectionConfig(
        given.rollout_is,
        upper,
        lower,
        given.rollout_is_batch_normalize,
        tuple(Rejection(name, most, least) for name, least, most in given.rejections()),
    )
    weights, seen = torch.ones_like(log_ratio), {}
    if config.level is not None:
        weights, seen = importance_weights(log_ratio, lengths, config)
    kept, more = kept_tokens(log_ratio, lengths, config)
    return config, weights, kept, {f"rollout_corr/{name}": value for name, value in (seen | more).items()}


def test_the_options_are_verls() -> None:
    assert set(RS_OPTIONS) == SUPPORTED_ROLLOUT_RS_OPTIONS


@pytest.mark.parametrize("level", [None, "token", "sequence"])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3])
def test_corrections_are_verls(level: str | None, spread: float) -> None:
    chance, noise = random.Random(f"{level} {spread}"), torch.Generator().manual_seed(0)
    for option in [*sorted(SUPPORTED_ROLLOUT_RS_OPTIONS), "token_k2,seq_mean_k1", None] * 2:
        names = option.split(",") if option else []
        given = RolloutCorrection(
            rollout_is=level,
            rollout_is_threshold=chance.choice(WEIGHT_BOUNDS),
            rollout_is_batch_normalize=chance.random() < 0.5,
            rollout_rs=option,
            rollout_rs_threshold=",".join(chance.choice(K1_BOUNDS if n.endswith("k1") else OTHER_BOUNDS) for n in names)
            or None,
        )
        lengths = torch.tensor([chance.randint(1, LONGEST) for _ in range(SEQUENCES)])
        mask = (torch.arange(LONGEST) < lengths[:, None]).long()
        old = -torch.rand(SEQUENCES, LONGEST, generator=noise, dtype=torch.float64)
        rollout = old - spread * torch.randn(SEQUENCES, LONGEST, generator=noise, dtype=torch.float64)
        losses = torch.randn(SEQUENCES, LONGEST, generator=noise, dtype=torch.float64)
        inside = mask.bool()

        fields = ("is", "is_threshold", "is_batch_normalize", "rs", "rs_threshold")
        arguments = {f"rollout_{field}": getattr(given, f"rollout_{field}") for field in fields}
        proto, verls_mask, verls = compute_rollout_correction_and_rejection_mask(old, rollout, mask, **arguments)
        verls_weights = torch.ones_like(losses) if proto is None else proto.batch["rollout_is_weights"]
        config, weights, kept, metrics = ours(given, (old - rollout)[inside], lengths)

        torch.testing.assert_close(weights, verls_weights[inside])
        assert torch.equal(kept, verls_mask[inside].bool()), given
        about = {name: value for name, value in verls.items() if "rollout_is_" in name or "rollout_rs_" in name}
        assert metrics == pytest.approx(about, rel=1e-5, abs=1e-6), given
        for mode in LOSS_AGG_MODES:
            for bypass in (False, True):  # whose means by token are over all tokens
                sizes = Denominators(int(mask.sum()), SEQUENCES, NORM)
                scales = loss_scales(weights, kept, lengths, mode, replace(config, bypass=bypass))
                tokens = max(1, int((mask if bypass else verls_mask).sum()))
                expected = agg_loss(losses * verls_weights, verls_mask, mode, 1, tokens, SEQUENCES, NORM)
                found = aggregate(losses[inside] * scales.policy, lengths, mode, sizes)
                assert float(found) == pytest.approx(float(expected), rel=1e-5, abs=1e-6), (given, mode)
