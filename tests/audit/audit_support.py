"""The tiny model of the self-test's tests, and the attention on either side."""

from typing import Any

from vexact.models import ModelConfig

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
