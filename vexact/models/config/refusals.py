"""Keys of config.json that would make another function of the model, and keys that make none."""

from __future__ import annotations

from vexact.models.checkpoint.files import mention
from vexact.models.config.fields import Fields, is_number

_QUANTISED = "says that the weights are quantised, which is not supported; use the bf16 or fp32 original"
_ATTENTION = "changes the attention, and is not supported; it must be absent"
_EXPERTS = "asks for a mixture of experts, which is not what the architecture computes; it must be absent"
_ROUTING = "routes tokens in a way that the architecture does not compute; it must be absent"
_JITTER = "would multiply what the router sees by random numbers in training alone; set it to 0"
_DROPOUT = "asks for dropout, which would make training and rollout two functions; set it to 0"
_SCALE = "scales the model in a way that is not supported; it must be 1 or absent"
_CAP = "caps the logits, which is not supported; it must be absent"
_PARTIAL = "is not supported; heads are rotated whole, so it must be 1 or absent"
_OTHER = "describes another kind of model; only plain decoders are supported"


def _by_key(groups: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {key: reason for reason, keys in groups.items() for key in keys}


# Anything but null, false, 0 and nothing is refused
_MUST_BE_OFF = _by_key({
    _ATTENTION: (
        "attn_logit_softcapping", "attention_multiplier", "query_pre_attn_scalar", "clip_qkv", "qkv_clip",
        "attention_chunk_size", "attn_temperature_tuning", "attn_scale", "no_rope_layers", "nope_layer_interval",
        "no_rope_layer_interval", "rope_interleaved", "rope_interleave", "rope_traditional", "use_alibi", "alibi",
        "sliding_window_pattern", "kv_lora_rank", "q_lora_rank", "attention_sinks", "rope_local_base_freq",
        "use_parallel_residual", "parallel_attn", "parallel_residual", "cross_layer_attention", "num_kv_shared_layers",
        "use_mrope", "use_bidirectional_attention",
    ),
    _EXPERTS: (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    _ROUTING: (
        "scoring_func", "topk_method", "n_shared_experts", "first_k_dense_replace", "mlp_only_layers",
    ),
    _JITTER: (
        "router_jitter_noise", "jitter_noise", "input_jitter_noise",
    ),
    _DROPOUT: (
        "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop",
        "embd_pdrop", "attn_pdrop", "residual_dropout", "resid_dropout", "embed_dropout", "embedding_dropout",
        "dropout",
    ),
    _CAP: (
        "final_logit_softcapping", "logit_softcapping", "logits_soft_cap", "output_logit_soft_cap",
    ),
    _SCALE: (
        "scale_depth", "dim_model_base", "scale_embedding", "mup_enabled", "use_mup",
    ),
    _OTHER: (
        "is_encoder_decoder", "add_cross_attention", "vision_config", "audio_config", "text_config", "per_layer_config",
        "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "pruned_heads",
    ),
})  # fmt: skip

# Anything but null and 1 is refused
_MUST_BE_ONE = _by_key({
    _SCALE: (
        "logits_scaling", "logit_scale", "embedding_multiplier", "residual_multiplier", "scale_emb", "embedding_scale",
        "lm_head_multiplier", "key_multiplier", "attention_in_multiplier", "attention_out_multiplier",
        "width_multiplier", "mup_width_multiplier", "residual_scale", "embed_scale",
    ),
    _ROUTING: (
        "n_group", "topk_group", "routed_scaling_factor", "moe_layer_freq", "decoder_sparse_step",
    ),
    _PARTIAL: (
        "rotary_pct", "rotary_percentage", "rope_percent", "rope_pct",
    ),
})  # fmt: skip

# Architectures that normalise the queries and keys of every head
QK_NORM = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
# How the files are stored, no matter what the model computes
_QUANTISATION = ("quantization_config", "compression_config", "quantization", "quant_config", "sparsity_config")
# Read elsewhere, or about tokenizers, generation, training and bookkeeping: no word about them
_HARMLESS = frozenset((
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "eos_token_id", "bos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "initializer_range", "use_sliding_window", "sliding_window",
    "max_window_layers", "layer_types", "qk_norm", "use_qk_norm", "auto_map", "dtype", "torch_dtype",
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "use_cache", "pretraining_tp",
    "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "finetuning_task", "id2label", "label2id", "problem_type", "num_labels", "tokenizer_class", "prefix", "is_decoder",
    "is_causal", "task_specific_params", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "unsloth_version", "unsloth_fixed", "is_llama_config", "max_sequence_length",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty", "cross_attention_hidden_size", "tie_encoder_decoder", "transformers.js_config",
    "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size",
))  # fmt: skip


def refuse_quantised(config: Fields) -> None:
    """Raises ValueError for a config.json that says so; a dictionary alone, without files, describes the same model."""
    for key in _QUANTISATION:
        if config.values.get(key):
            config.refuse(key, _QUANTISED)


def refuse_unsupported(config: Fields, architecture: str, num_layers: int, honoured: frozenset[str]) -> None:
    """
    Args:
        honoured: keys that this architecture reads, which others must not have.

    Raises:
        ValueError: a key asks for what the decoder does not compute.
    """
    for key, value in config.values.items():
        if key in _MUST_BE_OFF and value and key not in honoured:
            config.refuse(key, _MUST_BE_OFF[key])
        is_one = value is None or (is_number(value) and value == 1)
        if key in _MUST_BE_ONE and not is_one and key not in honoured:
            config.refuse(key, _MUST_BE_ONE[key])
    if not config.values.get("is_causal", True):  # null, too, is not true for transformers
        config.refuse("is_causal", "lets tokens see later ones, which is not supported; it must be true or absent")
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        if key in config:
            config.choice(key, ("silu", "swish"))
    for key in ("qk_norm", "use_qk_norm"):
        if key in config and config.flag(key, False) != (architecture in QK_NORM):
            config.refuse(key, f"is not what {architecture} computes; only {' and '.join(QK_NORM)} normalise them")
    _refuse_windows(config, architecture, num_layers)
    _refuse_own_code(config, architecture)
    known = _HARMLESS.union(
        honoured, _MUST_BE_OFF, _MUST_BE_ONE, _QUANTISATION, ("hidden_activation", "activation_function")
    )
    if unknown := sorted(set(config.values) - known):
        mention(f"{config.file}: these keys are not known here and change nothing: {', '.join(unknown)}")


def _refuse_windows(config: Fields, architecture: str, num_layers: int) -> None:
    layer_types = config.values.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * num_layers:
        config.refuse("layer_types", f'must be absent or {num_layers} (num_hidden_layers) times "full_attention"')
    if config.flag("use_sliding_window", False):
        config.refuse("use_sliding_window", "is not supported; use a checkpoint with use_sliding_window=false")
    # In Qwen's files the window is only a wish until use_sliding_window grants it, which Mixtral never reads; elsewhere
    # it is meant unless the other key denies it
    denied = "use_sliding_window" in config and architecture != "MixtralForCausalLM"
    if not (denied or architecture.startswith("Qwen")) and config.values.get("sliding_window"):
        config.refuse("sliding_window", "is not supported; it must be null or absent")


def _refuse_own_code(config: Fields, architecture: str) -> None:
    code = {name: value for name, value in config.object("auto_map").values.items() if _is_model(name)}
    if architecture.startswith("Deepseek") and set(map(str, code.values())) <= _deepseek_code(architecture):
        return  # what was released before transformers had these architectures
    if code:
        config.refuse(
            "auto_map",
            "names code of the checkpoint's own, which is never executed; remove the key if the weights are those of "
            "the plain architecture",
        )


def _is_model(name: str) -> bool:
    return name == "AutoConfig" or name.startswith("AutoModel")


def _deepseek_code(architecture: str) -> set[str]:
    family = architecture.removesuffix("ForCausalLM")
    models = {f"modeling_deepseek.{family}{kind}" for kind in ("Model", "ForCausalLM")}
    return models | {f"configuration_deepseek.{family}Config"}
