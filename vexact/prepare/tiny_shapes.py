"""Shapes of the tiny models that learn additions: one dense, one with experts, one with latent attention besides."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 32  # the tokenizer has 19; the warm-up drives the probability of the others to nothing


def tiny_config(tokenizer: Any) -> dict[str, Any]:
    """Hugging Face configuration of the dense model: Qwen3, 0.79 million parameters."""
    return _common(tokenizer) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": False,
    }


def tiny_moe_config(tokenizer: Any) -> dict[str, Any]:
    """Qwen3-MoE: two of eight experts a token, in every layer; 1.3 million parameters, 0.45 of them for one token."""
    return tiny_config(tokenizer) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tiny_moonlight_config(tokenizer: Any) -> dict[str, Any]:
    """Moonlight's kind of DeepSeek-V3: latent attention with queries projected directly, a dense first layer, then
    sigmoid scores with a correction bias, two of eight experts and a shared one."""
    return _common(tokenizer) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "attention_bias": False,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "num_nextn_predict_layers": 0,
    }


def _common(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.04,  # at this width it learns the sums in half the steps that the usual 0.02 takes
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
