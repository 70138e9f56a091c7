"""The model and the overrides that small runs of these tests share."""

from __future__ import annotations

from pathlib import Path

from vexact.models import ModelConfig, random_model, save_hf
from vexact.prepare.tokenizers import character_tokenizer


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
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.15,
    } | changes
    if "kv_lora_rank" in raw:  # whose heads have widths of their own
        del raw["head_dim"]
    config = ModelConfig.from_hf_dict(raw)
    save_hf(random_model(config, seed=0).named_parameters(), config, path)
    return path


def small_run(tiny: Path, directory: Path) -> list[str]:
    """4 prompts x 4 samples of 12 tokens a step, from the fixture ``tiny``, into ``directory``."""
    return [
        f"actor_rollout_ref.model.path={tiny / 'model'}",
        f"data.train_files={tiny / 'train.jsonl'}",
        f"reward.custom_reward_function.path={tiny / 'reward.py'}",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        "data.train_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "reward.num_workers=1",
        f"trainer.default_local_dir={directory}",
        "trainer.report=false",
    ]
