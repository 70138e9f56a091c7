"""Mixture of experts and latent attention in config.json: what is honoured, and what is refused with which words."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_configs import DEEPSEEK_V2, DEEPSEEK_V3, FAMILIES, MIXTRAL, MOONLIGHT, QWEN3_MOE
from test_config_fields import JSON, LLAMA, NO_SIZES, refusal
from transformers import AutoConfig

from vexact.models import ModelConfig
from vexact.models.config import MlaConfig, MoeConfig

ROUTER = frozenset({1, 2})
NOT_ZERO = [value for value in NO_SIZES if value != 0 or isinstance(value, bool)]


def test_what_each_family_is():
    configs = {name: ModelConfig.from_hf_dict(raw) for name, raw in FAMILIES.items()}
    every = frozenset(range(3))
    assert configs["qwen3-moe"].moe == MoeConfig(8, 3, 20, every, round_weights=True)
    assert configs["qwen3-moe-sparse"].moe == MoeConfig(8, 3, 20, frozenset({1}), normalize=False, round_weights=True)
    assert configs["mixtral"].moe == MoeConfig(5, 2, 40, every)
    moonlight = MoeConfig(
        8, 3, 20, ROUTER, scoring="sigmoid", scale=2.446, correction_bias=True, shared_intermediate_size=40
    )
    assert configs["moonlight"].moe == moonlight
    assert configs["deepseek-v2-lite"].moe == MoeConfig(8, 3, 20, ROUTER, normalize=False, shared_intermediate_size=40)
    groups = configs["deepseek-v2"].moe
    assert (groups.num_groups, groups.top_groups, groups.scale) == (4, 2, 16.0)
    latent = configs["moonlight"]
    assert latent.mla == MlaConfig(None, 24, 12, 8, 10, True, 20**-0.5)
    assert (latent.key_dim, latent.value_dim, latent.rope_dim, latent.num_kv_heads) == (20, 10, 8, 4)
    assert configs["qwen3-moe"].mla is None is ModelConfig.from_hf_dict(LLAMA).moe
    assert [configs["qwen3-moe-sparse"].has_experts(layer) for layer in range(3)] == [False, True, False]


def test_released_files_need_no_comment(caplog):
    """Keys of the released checkpoints, with the code that they name; transformers' own spellings mean the same."""
    moonlight = MOONLIGHT | {
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "seq_aux": True,
        "moe_layer_freq": 1,
        "pretraining_tp": 1,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    qwen = QWEN3_MOE | {"router_aux_loss_coef": 0.001, "output_router_logits": False, "max_window_layers": 3}
    renamed = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {"num_local_experts": 8}
    with caplog.at_level(logging.WARNING):
        configs = [ModelConfig.from_hf_dict(raw) for raw in (moonlight, qwen, renamed)]
    assert caplog.records == []
    assert configs[1].moe == configs[2].moe


@pytest.mark.parametrize("raw", [QWEN3_MOE, MIXTRAL, DEEPSEEK_V2, DEEPSEEK_V3], ids=lambda raw: raw["model_type"])
def test_defaults_are_those_of_transformers(raw):
    """A key that is not there means what transformers then takes, or is asked for; what weights or a tokenizer would
    contradict is left out."""
    named = ("architectures", "model_type")
    free = (*named, "eos_token_id", "num_key_value_heads", "q_lora_rank", "num_nextn_predict_layers")
    raw = raw | ({"n_routed_experts": 16, "topk_group": 4} if "n_group" in raw else {})
    silent, asked = [], {}
    for key in sorted(raw.keys() - free):
        few = {name: value for name, value in raw.items() if name != key}
        try:
            ours = ModelConfig.from_hf_dict(few)
        except ValueError as error:
            asked[key] = str(error)
            continue
        theirs = ModelConfig.from_hf_dict(
            AutoConfig.for_model(**few).to_dict() | {"architectures": raw["architectures"]}
        )
        assert replace(ours, raw={}) == replace(theirs, raw={}), key
        silent.append(key)
    assert all(f"{key} is missing" in message for key, message in asked.items())
    assert {"rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"} <= set(silent)
    assert ("norm_topk_prob" in silent) == ("norm_topk_prob" in raw)
    assert ("n_group" in silent) == ("n_group" in raw)


SIZES = {
    "num_experts": QWEN3_MOE,
    "num_experts_per_tok": MIXTRAL,
    "moe_intermediate_size": QWEN3_MOE,
    "num_local_experts": MIXTRAL,
    "n_routed_experts": DEEPSEEK_V3,
    "kv_lora_rank": DEEPSEEK_V3,
    "qk_nope_head_dim": DEEPSEEK_V2,
    "qk_rope_head_dim": DEEPSEEK_V3,
    "v_head_dim": DEEPSEEK_V2,
}


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize("key", SIZES)
def test_sizes(key, value):
    message = refusal(SIZES[key], **{key: value})
    assert f"{key}={json.dumps(value)}" in message
    assert "must be a whole number from 1 to " in message


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_have_to_be_there(key):
    assert "is missing" in refusal(SIZES[key], **{key: ...})


@pytest.mark.parametrize("key", ["first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"])
@pytest.mark.parametrize("value", NOT_ZERO, ids=repr)
def test_counts_that_may_be_zero(key, value):
    assert f"{key}={json.dumps(value)} must be a whole number" in refusal(DEEPSEEK_V3, **{key: value})


REFUSED = [
    (QWEN3_MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be a whole number from 1 to 8"),
    (QWEN3_MOE, {"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
    (QWEN3_MOE, {"mlp_only_layers": [3]}, "mlp_only_layers=[3] must be a list of layers, whole numbers from 0 to 2"),
    (QWEN3_MOE, {"mlp_only_layers": [True]}, "mlp_only_layers=[true]"),
    (QWEN3_MOE, {"mlp_only_layers": 1}, "mlp_only_layers=1"),
    (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    (QWEN3_MOE, {"num_local_experts": 4}, "num_local_experts=4 contradicts num_experts=8"),
    (QWEN3_MOE, {"shared_expert_intermediate_size": 16}, "shared_expert_intermediate_size=16 asks for a mixture"),
    (QWEN3_MOE, {"n_routed_experts": 8}, "n_routed_experts=8"),
    (QWEN3_MOE, {"use_qk_norm": False}, "use_qk_norm=false is not what Qwen3MoeForCausalLM computes"),
    (QWEN3_MOE, {"mlp_bias": True}, "mlp_bias=true"),
    (QWEN3_MOE, {"kv_lora_rank": 16}, "kv_lora_rank=16 changes the attention"),
    (QWEN3_MOE, {"model_type": "qwen3"}, 'model_type="qwen3" is not supported; supported: qwen3_moe'),
    (QWEN3_MOE, {"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}}, "auto_map"),
    (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 would multiply"),
    (MIXTRAL, {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
    (MIXTRAL, {"sliding_window": 4096, "use_sliding_window": False}, "sliding_window=4096 is not supported"),
    (MIXTRAL, {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    (MIXTRAL, {"attention_bias": True}, "attention_bias=true is not supported for MixtralForCausalLM"),
    (MIXTRAL, {"moe_intermediate_size": 16}, "moe_intermediate_size=16"),
    (DEEPSEEK_V3, {"scoring_func": "softmax"}, 'scoring_func="softmax" is not supported; supported: sigmoid'),
    (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, 'scoring_func="sigmoid" is not supported; supported: softmax'),
    (DEEPSEEK_V3, {"topk_method": "greedy"}, 'topk_method="greedy" is not supported; supported: noaux_tc'),
    (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, 'topk_method="noaux_tc"'),
    (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob=true is read in several ways"),
    (DEEPSEEK_V3, {"n_group": 3}, "n_group=3 must divide the 8 experts into equal groups of two or more"),
    (DEEPSEEK_V3, {"n_group": 8}, "n_group=8 must divide"),
    (DEEPSEEK_V3, {"n_group": ...}, "n_group is missing; it must divide the 8 experts"),
    (MOONLIGHT, {"topk_group": ...}, "topk_group is missing; it must be a whole number from 1 to 1"),
    (DEEPSEEK_V3, {"topk_group": 5}, "topk_group=5 must be a whole number from 1 to 4"),
    (DEEPSEEK_V3, {"topk_group": 1}, "num_experts_per_tok=3 is more than the experts of topk_group=1 groups, 2"),
    (DEEPSEEK_V3, {"routed_scaling_factor": 0}, "routed_scaling_factor=0 must be a number"),
    (DEEPSEEK_V3, {"routed_scaling_factor": ...}, "routed_scaling_factor is missing"),
    (DEEPSEEK_V3, {"first_k_dense_replace": 4}, "first_k_dense_replace=4"),
    (DEEPSEEK_V3, {"q_lora_rank": 0}, "q_lora_rank=0"),
    (DEEPSEEK_V3, {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
    (DEEPSEEK_V3, {"qk_head_dim": 24}, "qk_head_dim=24 must be qk_nope_head_dim + qk_rope_head_dim, 20"),
    (DEEPSEEK_V3, {"head_dim": 4}, "head_dim=4 must be qk_rope_head_dim, 8, or absent"),
    (DEEPSEEK_V3, {"num_key_value_heads": 2}, "num_key_value_heads=2 must be num_attention_heads, 4"),
    (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias=true"),
    (DEEPSEEK_V3, {"rope_interleave": None}, "rope_interleave=null must be true or false"),
    (DEEPSEEK_V2, {"rope_interleave": False}, "rope_interleave=false is not what DeepseekV2ForCausalLM computes"),
    (DEEPSEEK_V2, {"mlp_bias": True}, "mlp_bias=true"),
    (DEEPSEEK_V2, {"attention_dropout": 0.1}, "attention_dropout=0.1 asks for dropout"),
    (DEEPSEEK_V3, {"auto_map": {"AutoModel": "modeling_other.DeepseekV3Model"}}, "auto_map"),
    (DEEPSEEK_V3, {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}}, "auto_map"),
    (DEEPSEEK_V3, {"n_routed_experts": ...}, "n_routed_experts is missing"),
    (MIXTRAL, {"num_local_experts": ...}, "num_local_experts is missing"),
    (
        QWEN3_MOE,
        {"scoring_func": "sigmoid"},
        'scoring_func="sigmoid" routes tokens in a way that the architecture does',
    ),
    (QWEN3_MOE, {"n_group": 2}, "n_group=2 routes tokens"),
    (MIXTRAL, {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 routes tokens"),
    (MIXTRAL, {"decoder_sparse_step": 2}, "decoder_sparse_step=2 routes tokens"),
    (LLAMA, {"num_experts": 8}, "num_experts=8 asks for a mixture of experts"),
    (LLAMA, {"is_causal": False}, "is_causal=false lets tokens see later ones"),
    (QWEN3_MOE, {"is_causal": None}, "is_causal=null lets tokens see later ones"),
    (LLAMA, {"rope_interleave": True}, "rope_interleave=true"),
    (LLAMA, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
]


@pytest.mark.parametrize(("raw", "changes", "part"), REFUSED)
def test_refused(raw, changes, part):
    assert part in refusal(raw, **changes)


RAWS = [QWEN3_MOE, MIXTRAL, DEEPSEEK_V2, DEEPSEEK_V3]
KEYS = sorted({key for raw in RAWS for key in raw})


@settings(max_examples=300)
@given(raw=st.sampled_from(RAWS), key=st.sampled_from(KEYS), value=JSON | st.integers(0, 9))
def test_any_value_under_any_key(raw, key, value):
    """Either it is taken, and what is made of it fits together, or the message names the file and a key."""
    try:
        config = ModelConfig.from_hf_dict(raw | {key: value})
    except ValueError as error:
        named = re.match(r"config\.json: (\w+)", str(error))
        assert named is not None
        assert named[1] in raw or named[1] == key
        return
    moe = config.moe
    assert moe is not None
    assert type(moe.num_experts) is type(moe.top_k) is type(moe.intermediate_size) is int
    assert moe.num_experts % moe.num_groups == 0
    assert moe.top_k <= moe.top_groups * moe.num_experts // moe.num_groups
    assert moe.layers <= set(range(config.num_layers))
    assert config.rope_dim % 2 == 0 < config.value_dim <= config.num_heads * config.value_dim
