"""Small random models of transformers."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.deepseek_v2 import modeling_deepseek_v2

# In older releases (5.10 is one, 5.17 is not) GLM and DeepSeek choose experts inside the block; DeepSeek-V2 fails with
# groups, and leaves mscale out of the scale of its softmax: nothing to compare with.
ROUTERS_ARE_MODULES = hasattr(modeling_deepseek_v2, "DeepseekV2TopkRouter")
SHAPE = {  # odd where a model allows it: no width is a multiple of a vector
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 75,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

# torch's grouped product asks for rows of whole 16 bytes
EXPERTS = {"hidden_size": 64, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

LATENT = {  # attention of DeepSeek-V2 and V3, with their shared experts
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}


def build(kind, dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**SHAPE | changes)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.2)
    return model


def bits(x):
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])
