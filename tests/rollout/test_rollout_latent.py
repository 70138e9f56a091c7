"""The engine over a model with latent attention: keys wider than values in the cache, and the bits of training."""

from __future__ import annotations

import random

import torch
from rollout_models import VOCAB, bits, tiny_model, training_logprobs

from vexact.rollout import Engine, SamplingParams

LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "head_dim": None,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
}
KNOBS = (
    {"page_size": 4},
    {"page_size": 7, "max_num_seqs": 2, "enable_prefix_caching": False},
    {"page_size": 16, "max_num_batched_tokens": 24, "max_num_seqs": 5},  # prompts in chunks
)


def test_no_knob_changes_a_bit_and_training_has_the_same():
    model, rng = tiny_model(dtype=torch.bfloat16, **LATENT), random.Random(3)
    shared = [rng.randrange(VOCAB - 1) for _ in range(70)]
    prompts = [shared[:keep] + [rng.randrange(VOCAB - 1) for _ in range(5)] for keep in (0, 16, 63, 70)]
    names, params = [f"r{i}" for i in range(len(prompts))], SamplingParams(max_tokens=4, ignore_eos=True)
    found = []
    for knobs in KNOBS:
        engine = Engine(model=model, max_model_len=96, seed=5, **knobs)
        keys, values = engine._runner.kv_caches[0]
        assert (keys.shape[2:], values.shape[2:]) == ((4, 24), (4, 12))
        for _ in range(2):  # the second time over the prefix cache, then over one that has been away
            samples = engine.generate(prompts, params, names)
            found.append([(sample.token_ids, bits(sample.logprobs)) for sample in samples])
        engine.release_kv_cache()
        engine.resume_kv_cache()
        assert [(s.token_ids, bits(s.logprobs)) for s in engine.generate(prompts, params, names)] == found[0]
    assert all(other == found[0] for other in found)
    assert [bits(logprobs) for logprobs in training_logprobs(model, samples)] == [logprobs for _, logprobs in found[0]]
