"""Tiny checkpoints, and one thread: tiny tensors gain nothing from more."""

import pytest
import torch

from vexact.models import ModelConfig, random_model, save_hf

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}
FAMILIES = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "pad_token_id": 5},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "odd": {  # no width that a vector or a tile divides
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 515,
        "hidden_size": 100,
        "intermediate_size": 133,
        "num_attention_heads": 6,
        "head_dim": 20,
    },
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for family, changes in FAMILIES.items():
        config = ModelConfig.from_hf_dict(SHAPE | changes)
        save_hf(random_model(config, seed=3).named_parameters(), config, root / family)
    return root
