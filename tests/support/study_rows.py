"""Rows of a study that are made by hand."""

import math


def row(mode: str, seed: int, score: float, **changes) -> dict:
    return {
        "id": f"{mode}-{seed}",
        "part": "p",
        "subject": "s",
        "mode": mode,
        "correction": "uncorrected",
        "algorithm": "grpo",
        "lr": 0.1,
        "seed": seed,
        "status": "done",
        "steps": 20,
        "exact_score": score,
        "wall_s": 1.0,
        "cpu_s": 1.0,
        "environment": '{"versions": {}, "device": "cpu", "commit": null, "threads": 1}',
        "reward": [0.5] * 20,
        "grad_norm": [1.0] * 20,
        "entropy": [1.0] * 20,
        "k3_kl": [0.0] * 20,
        "probs_diff": [0.0] * 20,
        "tokens_compared": [10.0] * 20,
        "tokens_different": [0.0] * 20,
        "routes_different": [math.nan] * 20,
        "ppo_kl": [0.5] * 20,
        "clip_fraction": [0.0] * 20,
        "effective_samples": [math.nan] * 20,
        "rejected": [math.nan] * 20,
        "skipped_steps": [0.0] * 20,
        "length": [9.0] * 20,
    } | changes


def cells(*modes: str) -> list:
    return [("s", "grpo", 0.1, mode, "uncorrected") for mode in modes]
