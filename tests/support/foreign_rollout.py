"""A rollout as another package would provide it: our engine behind the foreign protocol, off by one bit.

``FAULT`` (environment) makes it break what it promised: ``keep`` keeps the old weights, ``late`` forgets the version.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vexact.models import load_model
from vexact.rollout import Engine
from vexact.rollout.stats import GenerationStats
from vexact.weights import WeightSyncError, checksum


def register(directory: Path, group: str = "vexact.rollouts", package: str = "elsewhere", **entries: str) -> Path:
    """Writes what an installed package leaves: ``directory`` on the path then provides the entries."""
    info = directory / f"{package}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return directory


def check(config) -> None:
    if config.rollout.top_k > 0:
        raise ValueError(f"actor_rollout_ref.rollout.top_k={config.rollout.top_k}: nudged does not have it")


def build(config, tokenizer, device):
    return Nudged(config, tokenizer, device)


class Nudged:
    num_replicas = 1
    device = torch.device("cpu")

    def __init__(self, config, tokenizer, device):
        self.seed, self.max_model_len, self.weights_version = config.rollout_seed, config.max_model_len, 0
        model = load_model(config.model.path, dtype=torch.float32, device=device)
        self._engine = Engine(model=model, tokenizer=tokenizer, seed=self.seed, max_model_len=self.max_model_len)
        self.vocab_size, self.num_cache_tokens = self._engine.vocab_size, self._engine.num_cache_tokens
        self._tokens = 0

    def generate(self, prompts, sampling_params, request_ids):
        samples = self._engine.generate(prompts, sampling_params, request_ids)
        self._tokens += sum(len(sample.token_ids) for sample in samples)
        return [replace(sample, logprobs=np.nextafter(sample.logprobs, np.float32(-1e9))) for sample in samples]

    def check_updatable(self):
        self._engine.check_updatable()

    def take_weights(self, named_tensors, version):
        sent = {name: tensor.clone() for name, tensor in named_tensors}
        fault = os.environ.get("FAULT", "")
        if fault != "keep":
            self._engine.update_weights(sent.items(), version)
        for name, parameter in self._engine.model.named_parameters():
            if checksum(parameter.detach()) != checksum(sent[name]):
                raise WeightSyncError(f"nudged still has the old {name}")
        self.weights_version = version - (fault == "late")
        return {"timing_s/weights_check": 0.0}

    def take_stats(self):
        taken, self._tokens = self._tokens, 0
        return GenerationStats(taken, 1.0)

    def stats(self):
        return self.take_stats().metrics()

    def clear_prefix_cache(self):
        self._engine.clear_prefix_cache()

    def release_kv_cache(self):
        self._engine.release_kv_cache()

    def resume_kv_cache(self):
        self._engine.resume_kv_cache()

    def close(self):
        self._engine = None
