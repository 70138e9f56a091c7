"""Keys that verl has and we do not: refused with the reason, moved to our key, or dropped with a notice.

A verl script that leaves such a key at a value that means what we do anyway keeps working.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING
from vexact.config.fields import ConfigError

_ROLLOUT = "actor_rollout_ref.rollout"
_ACTOR = "actor_rollout_ref.actor"
_MODEL = "actor_rollout_ref.model"
_PACKED = "sequences are packed up to ppo_max_token_len_per_gpu tokens, which log-probabilities do not depend on"
_ROUTES = "rollout and trainer choose the same experts, which bitwise/routes_different counts: nothing to replay"
_TRACES = "trainer.profile_steps and .profile_ranks say what is traced, by torch.profiler"
_ONE_GPU = "every GPU that generates holds a whole replica of the engine"


@dataclass(frozen=True, slots=True)
class Refused:
    """A key whose other values we cannot honour. ``harmless`` values mean what we do anyway."""

    key: str  # a name, or a pattern with * for a subtree
    harmless: tuple[Any, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Unused:
    """A key that has no effect here, and why."""

    key: str
    reason: str


REFUSED = (
    Refused(
        "critic.enable", (None, False), "there is no critic in this version; use a critic-free algorithm.adv_estimator"
    ),
    Refused("critic.*", (), "there is no critic in this version; use a critic-free algorithm.adv_estimator"),
    Refused("trainer.critic_warmup", (0,), "there is no critic in this version"),
    Refused("data.custom_cls.path", (None,), "write your rows to parquet or JSONL, or use a reasoning_gym: task"),
    Refused("data.custom_cls.name", (None,), "write your rows to parquet or JSONL, or use a reasoning_gym: task"),
    Refused("data.tokenizer", (None,), f"set {_MODEL}.tokenizer_path"),
    Refused(f"{_MODEL}.override_config", ({},), "change config.json of the checkpoint"),
    Refused(f"{_MODEL}.override_config.*", (), "change config.json of the checkpoint"),
    Refused("algorithm.lam", (1, None), "lam belongs to GAE, which needs a critic"),
    Refused(f"{_ROLLOUT}.tensor_model_parallel_size", (1,), _ONE_GPU),
    Refused(f"{_ROLLOUT}.pipeline_model_parallel_size", (1,), _ONE_GPU),
    Refused(f"{_ROLLOUT}.data_parallel_size", (1,), _ONE_GPU),
    Refused(f"{_ROLLOUT}.expert_parallel_size", (1,), _ONE_GPU),
    Refused(
        f"{_ROLLOUT}.do_sample", (True,), "greedy training rollouts would give every sample of a group the same text"
    ),
    Refused(
        f"{_ROLLOUT}.calculate_log_probs", (True,), "the rollout's log-probabilities are the old log-probabilities here"
    ),
    Refused(
        f"{_ROLLOUT}.logprobs_mode",
        ("processed_logprobs", None),
        "log-probabilities are those after temperature and truncation",
    ),
    Refused(f"{_ROLLOUT}.multi_turn.enable", (False,), "multi-turn rollouts are not supported yet"),
    Refused(f"{_ROLLOUT}.multi_turn.*", (None,), "multi-turn rollouts are not supported yet"),
    *(
        Refused(f"{section}.{name}", harmless, reason)
        for section in (_ROLLOUT, f"{_ROLLOUT}.val_kwargs")
        for name, (harmless, reason) in REFUSED_SAMPLING.items()
    ),
    *(
        Refused(f"{section}.prompt_logprobs", (None,), "nothing here reads them; SamplingParams of an engine has it")
        for section in (_ROLLOUT, f"{_ROLLOUT}.val_kwargs")
    ),
    *(
        Refused(f"{section}.logit_bias.*", (), REFUSED_SAMPLING["logit_bias"][1])
        for section in (_ROLLOUT, f"{_ROLLOUT}.val_kwargs")
    ),
    Refused(f"{_ROLLOUT}.prompt_length", (None,), "set data.max_prompt_length"),
    Refused(f"{_ROLLOUT}.response_length", (None,), "set data.max_response_length"),
    Refused(f"{_ROLLOUT}.engine_kwargs.vexact.max_cache_blocks", (None,), f"set {_ROLLOUT}.num_pages"),
    Refused(f"{_ROLLOUT}.engine_kwargs.vexact.attn_impl", (None,), f"set {_ROLLOUT}.attn_impl"),
    Refused(
        f"{_ROLLOUT}.engine_kwargs.*",
        (None,),
        "no engine has keys of its own; those of every rollout lie directly in the rollout section",
    ),
    Refused(
        "actor_rollout_ref.ref.ulysses_sequence_parallel_size",
        (None,),
        f"the reference policy takes {_ACTOR}.ulysses_sequence_parallel_size",
    ),
    Refused(f"{_ACTOR}.entropy_from_logits_with_chunking", (False, True), "the entropy is always computed in chunks"),
    Refused(
        f"{_ACTOR}.fsdp_config.offload_policy",
        (False,),
        f"it steps on the CPU, whose bits are others; set {_ACTOR}.fsdp_config.param_offload and .optimizer_offload",
    ),
    Refused(f"{_ACTOR}.fsdp_config.fsdp_size", (-1,), "weights are sharded over all GPUs that train"),
    Refused(f"{_ACTOR}.optim.clip_grad", (None,), f"set {_ACTOR}.grad_clip"),
    Refused(f"{_MODEL}.lora_rank", (0,), "LoRA is not supported yet"),
    Refused(f"{_MODEL}.trust_remote_code", (False,), "models are defined here; code from a checkpoint is never run"),
    Refused("data.trust_remote_code", (False,), "code from a checkpoint is never run"),
    Refused(f"{_MODEL}.use_remove_padding", (True,), "sequences are always packed without padding"),
    Refused(f"{_MODEL}.use_liger", (False,), "the operators must be the ones the rollout uses"),
    Refused(f"{_MODEL}.enable_activation_offload", (False,), "offloading is not supported yet"),
    Refused(f"{_MODEL}.external_lib", (None,), "nothing is patched from outside"),
    Refused(
        "reward.reward_model.enable", (False,), "reward models are not supported yet; use reward.custom_reward_function"
    ),
    Refused(
        "reward.sandbox_fusion.url",
        (None,),
        "there is no sandbox client; call yours from reward.custom_reward_function",
    ),
    Refused("data.image_key", (None, "images"), "only text is supported"),
    Refused("data.video_key", (None, "videos"), "only text is supported"),
    Refused("global_profiler.tool", (None, "torch"), "traces are torch.profiler's"),
    Refused("model_engine", ("dp", "fsdp", "fsdp2"), "only FSDP2 is built in"),
)

UNUSED = (
    Unused("trainer.balance_batch", "micro-batches are cut without looking at GPUs and dealt to them in turn"),
    Unused("trainer.use_v1", "there is one trainer"),
    Unused("trainer.v1.*", "there is one trainer"),
    Unused("trainer.max_critic_ckpt_to_keep", "there is no critic"),
    Unused("trainer.log_val_generations", "samples are written to samples/ in the run directory"),
    Unused("trainer.rollout_data_dir", "samples are written to samples/ in the run directory"),
    Unused("trainer.validation_data_dir", "samples are written to samples/ in the run directory"),
    Unused("algorithm.kl_ctrl.horizon", "the coefficient is fixed"),
    Unused("algorithm.kl_ctrl.target_kl", "the coefficient is fixed"),
    Unused("data.val_batch_size", "the engine batches validation prompts itself"),
    Unused("data.validation_shuffle", "the order of validation rows changes nothing"),
    Unused("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu", _PACKED),
    Unused("data.return_raw_chat", "chats are templated while loading"),
    Unused("data.dataloader_num_workers", "rows are tokenised up front"),
    Unused("data.filter_overlong_prompts_workers", "rows are tokenised in one process"),
    Unused("data.gen_batch_size", "refills ask for what is missing"),
    Unused(f"{_MODEL}.use_fused_kernels", "the loss is always fused"),
    Unused(f"{_MODEL}.fused_kernel_options.*", "the loss is always fused"),
    Unused(f"{_MODEL}.lora_alpha", "LoRA is off"),
    Unused(f"{_MODEL}.target_modules", "LoRA is off"),
    Unused(f"{_ACTOR}.ppo_micro_batch_size_per_gpu", _PACKED),
    Unused(f"{_ACTOR}.use_dynamic_bsz", _PACKED),
    Unused(
        f"{_ACTOR}.fsdp_config.reshard_after_forward",
        "a layer's gathered weights are always given back after its forward",
    ),
    Unused(f"{_ACTOR}.use_torch_compile", "operators are compiled ahead of use"),
    Unused("actor_rollout_ref.ref.use_torch_compile", "operators are compiled ahead of use"),
    Unused(f"{_ACTOR}.checkpoint.*", "a checkpoint always holds model, optimizer and data position"),
    Unused(f"{_ACTOR}.fsdp_config.forward_prefetch", "prefetching is PyTorch's default"),
    Unused(f"{_ACTOR}.fsdp_config.full_determinism", "runs are always deterministic"),
    Unused(f"{_ACTOR}.data_loader_seed", "there is one seed, trainer.seed"),
    Unused(f"{_ROLLOUT}.full_determinism", "runs are always deterministic"),
    Unused(f"{_ACTOR}.router_replay.*", _ROUTES),
    Unused(f"{_ROLLOUT}.enable_rollout_routing_replay", _ROUTES),
    Unused(f"{_ROLLOUT}.mode", "there is one mode"),
    Unused(f"{_ROLLOUT}.load_format", "weights come from the trainer"),
    Unused(f"{_ROLLOUT}.disable_log_stats", "statistics are always reported"),
    Unused(f"{_ROLLOUT}.log_prob_*", _PACKED),
    Unused("actor_rollout_ref.ref.log_prob_use_dynamic_bsz", _PACKED),
    Unused(f"{_ROLLOUT}.agent.*", "rollouts are single-turn"),
    Unused(
        f"{_ROLLOUT}.checkpoint_engine.*", "weights always travel in buckets, compared bit for bit where they arrive"
    ),
    Unused(f"{_ROLLOUT}.trace.*", "tracing is not built in"),
    Unused(f"{_ROLLOUT}.prometheus.*", "metrics go to trainer.logger"),
    Unused("global_profiler.*", _TRACES),
    *(
        Unused(f"{section}.profiler.*", _TRACES)
        for section in (_ACTOR, _ROLLOUT, "actor_rollout_ref.ref", "actor_rollout_ref", "reward.reward_model")
    ),
    Unused("ray_kwargs.*", "trainer.ray_address names the cluster, and RAY_* variables set it up"),
)

MOVED = {
    "global_profiler.steps": "trainer.profile_steps",
    "trainer.max_actor_ckpt_to_keep": "trainer.keep_last",
    "custom_reward_function.path": "reward.custom_reward_function.path",
    "custom_reward_function.name": "reward.custom_reward_function.name",
    "reward_model.reward_manager": "reward.reward_manager.name",
    f"{_ACTOR}.veomni.attn_implementation": f"{_ACTOR}.attn_implementation",
}


def named_keys() -> list[str]:
    """The keys above, without those of whole subtrees."""
    keys = [*(refused.key for refused in REFUSED), *(unused.key for unused in UNUSED)]
    return [*(key for key in keys if "*" not in key), *MOVED]


def translate(key: str, value: Any) -> str | None:
    """What to tell the user about a key that neither the schema has nor ``MOVED``; None when there is nothing to say.

    Raises:
        ConfigError: verl honours this value and we cannot.
        KeyError: neither verl nor we know the key.
    """
    for refused in REFUSED:
        if fnmatchcase(key, refused.key):
            _require_harmless(refused, key, value)
            return None
    for unused in UNUSED:
        if fnmatchcase(key, unused.key):
            return f"{key}={value} has no effect: {unused.reason}"
    raise KeyError(key)


def _require_harmless(refused: Refused, key: str, value: Any) -> None:
    # True == 1 in Python, but a size of True is not a size of 1
    if any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in refused.harmless):
        return
    accepted = " or ".join("null" if item is None else str(item).lower() for item in refused.harmless)
    fix = f"remove it or set {key}={accepted}" if accepted else "remove it"
    raise ConfigError(f"{key}={value}: not supported: {refused.reason}; {fix}")
