"""A tiny model that vLLM can run, and data; vLLM starts once for all tests of the engine."""

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")

from vexact.config import load_config
from vexact.models import ModelConfig, random_model, save_hf
from vexact.models.tokenizer import read_tokenizer
from vexact.prepare.tokenizers import character_tokenizer

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(c in "13579" for c in solution_str) / max(1, len(solution_str))
"""


def write_model(path: Path, **changes) -> Path:
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(path)
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.15,
    } | changes
    config = ModelConfig.from_hf_dict(raw)
    save_hf(random_model(config, seed=0).named_parameters(), config, path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directory with model/, train.jsonl and reward.py."""
    root = tmp_path_factory.mktemp("tiny")
    write_model(root / "model")
    with (root / "train.jsonl").open("w") as file:
        for a in range(24):
            row = {"data_source": "sum", "prompt": f"{a}+{a}=", "reward_model": {"ground_truth": str(2 * a)}}
            file.write(json.dumps(row) + "\n")
    (root / "reward.py").write_text(REWARD)
    return root


@pytest.fixture(scope="session")
def settings(tiny):
    """Arguments of a run: settings(model=..., further overrides)."""

    def arguments(*more: str, model: Path | None = None) -> list[str]:
        return [
            f"actor_rollout_ref.model.path={model or tiny / 'model'}",
            f"data.train_files={tiny / 'train.jsonl'}",
            f"reward.custom_reward_function.path={tiny / 'reward.py'}",
            "data.max_prompt_length=16",
            "data.max_response_length=12",
            "data.train_batch_size=4",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.rollout.name=vllm",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "reward.num_workers=1",
            "trainer.logger=[jsonl]",
            *more,
        ]

    return arguments


@pytest.fixture(scope="session")
def start(settings):
    """Starts vLLM on a model: start(model, dtype)."""
    from vexact_vllm import build

    def started(model: Path, dtype: str):
        config = load_config(
            settings(
                f"actor_rollout_ref.rollout.dtype={dtype}",
                f"actor_rollout_ref.actor.fsdp_config.dtype={dtype}",
                model=model,
            )
        )
        return build(config, read_tokenizer(model), torch.device("cpu"))

    return started
