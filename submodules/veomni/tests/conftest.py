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
ODD = {  # no width that a vector or a tile divides; torch's grouped product asks for rows of whole 16 bytes
    "vocab_size": 515,
    "hidden_size": 104,
    "intermediate_size": 133,
    "num_attention_heads": 6,
    "head_dim": 20,
}
FAMILIES = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "pad_token_id": 5},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3_moe": ODD  # a layer of experts, a dense one
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "mixtral": {  # VeOmni has no model of its own for it
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": ODD  # latent attention, a dense layer, a layer of experts and shared ones
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 6,
        "head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 44,
        "kv_lora_rank": 36,
        "qk_nope_head_dim": 13,
        "qk_rope_head_dim": 10,
        "v_head_dim": 15,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.446,
    },
    "odd": ODD | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 100},
}


def with_router_biases(model):
    """Correction biases that no other dtype holds; a random model has zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter.copy_(torch.linspace(-0.3, 0.3, len(parameter)))
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for family, changes in FAMILIES.items():
        config = ModelConfig.from_hf_dict(SHAPE | changes)
        save_hf(with_router_biases(random_model(config, seed=3)).named_parameters(), config, root / family)
    return root
