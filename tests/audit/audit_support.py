"""Tiny models for the tests of audit and verify, and the attention on either side."""

from typing import Any

from vexact.models import ModelConfig

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
"""Of tiny checkpoints of any family."""
CONFIG = ModelConfig.from_hf_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
)
PAIR: dict[str, Any] = {
    "rollout_attention": "triton-invariant",
    "trainer_attention": "triton-invariant",
    "environment": {"device": "a test"},
}
