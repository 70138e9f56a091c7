"""Shapes of public checkpoints, for models with random weights."""

from __future__ import annotations

from typing import Any

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "initializer_range": 0.02,
    }


def _qwen3(*sizes: Any) -> dict[str, Any]:
    return _sizes(*sizes) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "attention_bias": False,
    }


def _qwen25(vocab: int, *sizes: Any) -> dict[str, Any]:
    return _sizes(*sizes) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


def _llama(head_dim: int, factor: float, *sizes: Any) -> dict[str, Any]:
    return _sizes(*sizes) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3_ROPE | {"factor": factor},
        "attention_bias": False,
        "mlp_bias": False,
    }


def _qwen3_moe(experts: int, per_token: int, expert_width: int, *sizes: Any) -> dict[str, Any]:
    return _qwen3(*sizes) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": expert_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _deepseek(architecture: str, vocab: int, *sizes: Any) -> dict[str, Any]:
    """Latent attention without query compression; the first layer is dense, the others have 64 + 2 experts."""
    return _sizes(*sizes) | {
        "architectures": [f"Deepseek{architecture}ForCausalLM"],
        "model_type": f"deepseek_{architecture.lower()}",
        "vocab_size": vocab,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "attention_bias": False,
    }


_MOONLIGHT = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
}
_DEEPSEEK_V2_LITE = {
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, False),
    "qwen2.5-0.5b": _qwen25(151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": _qwen25(151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": _qwen25(152064, 3584, 18944, 28, 28, 4, False),
    "llama3.2-1b": _llama(64, 32.0, 2048, 8192, 16, 32, 8, True),
    "llama3.2-3b": _llama(128, 32.0, 3072, 8192, 28, 24, 8, True),
    "llama3.1-8b": _llama(128, 8.0, 4096, 14336, 32, 32, 8, False),
    "qwen3-30b-a3b": _qwen3_moe(128, 8, 768, 2048, 6144, 48, 32, 4, False),
    "moonlight-16b-a3b": _deepseek("V3", 163840, 2048, 11264, 27, 16, 16, False) | _MOONLIGHT,
    "deepseek-v2-lite": _deepseek("V2", 102400, 2048, 10944, 27, 16, 16, False) | _DEEPSEEK_V2_LITE,
}
