"""Operations counted by hand, once for each kind of layer."""

from vexact.models import ModelConfig
from vexact.models.flops import layer_weights, training_flops

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 20,
    "moe_intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 7,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


def test_dense() -> None:
    config = ModelConfig.from_hf_dict(DENSE)
    # queries 8 x 24, keys and values 8 x 12 each, output 24 x 8; gate, up and down 8 x 20 each
    assert layer_weights(config) == 3 * (192 + 96 + 96 + 192 + 480) == 3168
    # 5 tokens of which 2 are a response: 15 pairs of query and key, each 2 x (6 + 6) operations in 4 heads and 3 layers
    forward = 2 * 3168 * 5 + 15 * 24 * 4 * 3 + 2 * 8 * 100 * 2
    assert forward == 31680 + 4320 + 3200
    assert training_flops(config, [(3, 2)]) == 3 * forward == 117600
    assert training_flops(config, [(3, 2), (3, 2)]) == 2 * 117600
    assert training_flops(config, []) == 0


def test_experts_count_as_often_as_a_token_meets_them() -> None:
    config = ModelConfig.from_hf_dict(EXPERTS)
    # two of 16 experts of width 5, 3 x 8 x 5 each, and a router 8 x 16; layer 1 is dense
    assert layer_weights(config) == 3 * 576 + 2 * (240 + 128) + 480 == 2944


def test_latent_attention() -> None:
    config = ModelConfig.from_hf_dict(LATENT)
    # queries 8 x 2 x 5, latent 8 x (4 + 2), expanded 4 x 2 x (3 + 7), output 2 x 7 x 8
    attention = 80 + 48 + 80 + 112
    # layer 0 dense; layer 1 two experts and the shared one, 3 x 8 x 5 each, and a router 8 x 8
    assert layer_weights(config) == 2 * attention + 480 + 3 * 120 + 64 == 1544
    ranked = ModelConfig.from_hf_dict(LATENT | {"q_lora_rank": 6})
    # queries by way of 6 numbers: 8 x 6 and 6 x 10 instead of 8 x 10
    assert layer_weights(ranked) == 1544 + 2 * (48 + 60 - 80)
    # 2 tokens, 3 pairs, each 2 x (5 + 7) operations in 2 heads and 2 layers
    assert training_flops(config, [(1, 1)]) == 3 * (2 * 1544 * 2 + 3 * 24 * 2 * 2 + 2 * 8 * 100)


def test_a_released_model_is_near_six_operations_a_weight() -> None:
    config = ModelConfig.from_hf_dict({  # Qwen3-0.6B, 440 M weights in its layers
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    })  # fmt: skip
    assert layer_weights(config) == 28 * (1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072) == 440401920
    head = 1024 * 151936
    assert 6 * (440401920 + head) < training_flops(config, [(0, 1)]) < 1.001 * 6 * (440401920 + head)
