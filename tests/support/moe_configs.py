"""Small configurations of the families with experts, as their config.json says it."""

from __future__ import annotations

from typing import Any

import torch

_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
QWEN3_MOE = _SHAPE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 12,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MIXTRAL = _SHAPE | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = _SHAPE | {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
DEEPSEEK_V3 = _DEEPSEEK | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}
MOONLIGHT = DEEPSEEK_V3 | {"n_group": 1, "topk_group": 1}
DEEPSEEK_V2 = _DEEPSEEK | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3-moe": QWEN3_MOE,
    "qwen3-moe-sparse": QWEN3_MOE
    | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [2], "tie_word_embeddings": True},
    "qwen3-moe-all": QWEN3_MOE | {"num_experts_per_tok": 8, "attention_bias": True},
    "mixtral": MIXTRAL,
    "moonlight": MOONLIGHT,
    "deepseek-v3": DEEPSEEK_V3 | {"q_lora_rank": 28},
    "deepseek-v3-halves": DEEPSEEK_V3 | {"rope_interleave": False, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "deepseek-v3-yarn": DEEPSEEK_V3
    | {"norm_topk_prob": False, "rope_parameters": _YARN | {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "deepseek-v2-lite": DEEPSEEK_V2
    | {"rope_parameters": _YARN | {"factor": 4.0, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek-v2": DEEPSEEK_V2
    | {
        "q_lora_rank": 28,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
}


def with_router_biases(model):
    """The model, whose routers get biases that no other dtype holds; a random model has zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter.copy_(torch.linspace(-0.3, 0.3, len(parameter)))
    return model
