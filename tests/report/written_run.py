"""Run directories as a trainer leaves them, without a trainer."""

import json
from pathlib import Path

import numpy as np
import yaml

from vexact.report import write_samples
from vexact.types import Prompt, Sample, SampleGroup, Score

PARTS = {"gen": 0.3, "reward": 0.05, "adv": 0.01, "update_actor": 0.4, "update_weights": 0.04}


def row(step: int, seed: int = 0, different: int = 0) -> dict:
    """The metrics of a step; its reward rises with the step, a little higher with every seed."""
    timing = {f"timing_s/{name}": seconds for name, seconds in PARTS.items()}
    nested = {"timing_s/audit": 0.1, "timing_s/weights_cast": 0.01, "timing_s/sync_weights": 0.04}
    metrics = {
        "critic/score/mean": 0.01 * step + 0.1 * seed,
        "val-core/sum/acc/mean@1": 0.02 * step,
        "bitwise/tokens_compared": 100,
        "bitwise/tokens_different": different,
        "bitwise/routes_compared": 100,
        "bitwise/routes_different": 0,
        "bitwise/max_ulp": 3 * different,
        "bitwise/tokens_redrawn": 6,
        "bitwise/tokens_redrawn_different": 0,
        "rollout_corr/k3_kl": 1e-4 * different,
        "training/rollout_probs_diff_max": 1e-3 * different,
        "actor/entropy": 2 / step,
        "actor/grad_norm": 1.0 + step % 3,
        "actor/pg_clipfrac": 0.0,
        "response_length/mean": 5.0 + step,
        "perf/throughput": 1000.0,
        "perf/time_per_step": 1.0,
        "perf/max_memory_allocated_gb": 2.5,
    }
    return {"step": step, "time": 1.7e9 + step} | metrics | timing | nested | {"timing_s/step": 1.0}


def config(**trainer) -> dict:
    defaults = {"seed": 0, "experiment_name": "one", "total_training_steps": 4}
    return {
        "trainer": defaults | trainer,
        "actor_rollout_ref": {"actor": {"optim": {"lr": 1e-3}}, "rollout": {"mismatch": {"mode": "none"}}},
    }


def write_run(
    directory: Path,
    rows: list[dict] | None = None,
    settings: dict | None = None,
    response: str = "4 two",
    different: dict[str, list[int]] | None = None,
    **trainer,
) -> Path:
    """A finished run of 4 steps, with samples of the last step and a certificate; ``different`` as of an audit."""
    directory.mkdir(parents=True)
    settings = config(**trainer) if settings is None else settings
    rows = [row(step, settings["trainer"]["seed"]) for step in range(1, 5)] if rows is None else rows
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    (directory / "environment.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}, "device": "cpu"}))
    comparison = {"tokens_compared": 40, "tokens_different": 0}
    certificate = {"exact": True, "comparison": comparison, "dtype": "float32", "environment": {"device": "cpu"}}
    (directory / "certificate.json").write_text(json.dumps(certificate))
    words = {1: response[:1], 2: response[1:], 3: "<end>"}
    write_samples(
        directory, 4, [group(response)], lambda ids: "".join(words[token] for token in ids), different=different
    )
    return directory


def group(response: str, prompt: str = "2+2=") -> SampleGroup:
    sample = Sample(
        request_id="a",
        prompt_token_ids=(7, 8),
        token_ids=(1, 2, 3),
        logprobs=np.array([-0.5, -2.25, -np.inf], np.float32),
        min_logits=np.full(3, -np.inf, np.float32),
        temperature=1.0,
        finish_reason="stop",
        weights_version=3,
        text=response,
    )
    return SampleGroup(Prompt(0, (7, 8), prompt, "sum", "4"), (sample,), (Score(1.0, {"acc": 1.0}),))
