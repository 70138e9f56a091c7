"""Keys of verl's whose other values would change a run in a way that is not built in."""

from __future__ import annotations

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING
from vexact.config.checks.verl.entry import Refused

_ROLLOUT = "actor_rollout_ref.rollout"
_ACTOR = "actor_rollout_ref.actor"
_REF = "actor_rollout_ref.ref"
_MODEL = "actor_rollout_ref.model"
_ONE_GPU = "every GPU that generates holds a whole replica of the engine"
_CRITIC = "there is no critic in this version; use a critic-free algorithm.adv_estimator"
_FLOATS = "weights are sampled and trained in the types of rollout.dtype and actor.fsdp_config"
_ADAMW = "the optimizer is AdamW, spelled element by element"
_LORA = "LoRA is not supported yet"
_REWARD_MODEL = "reward models are not supported yet; use reward.custom_reward_function"

REFUSED = (
    Refused("critic.enable", (None, False), _CRITIC),
    Refused("trainer.critic_warmup", (0,), "there is no critic in this version"),
    Refused("trainer.default_hdfs_dir", (None,), "checkpoints are written to trainer.default_local_dir only"),
    Refused("trainer.del_local_ckpt_after_load", (False,), "set trainer.keep_last to keep fewer checkpoints"),
    Refused("trainer.checkpoint_callback_class", (None,), "nothing is called from outside"),
    Refused("data.custom_cls.path", (None,), "write your rows to parquet or JSONL, or use a reasoning_gym: task"),
    Refused("data.custom_cls.name", (None,), "write your rows to parquet or JSONL, or use a reasoning_gym: task"),
    Refused("data.tokenizer", (None,), f"set {_MODEL}.tokenizer_path"),
    Refused(f"{_MODEL}.override_config", ({},), "change config.json of the checkpoint"),
    Refused(f"{_MODEL}.override_config.*", (), "change config.json of the checkpoint"),
    Refused("algorithm.lam", (1, None), "lam belongs to GAE, which needs a critic"),
    Refused("algorithm.use_pf_ppo", (False,), "samples are not drawn anew by their scores"),
    Refused("distillation.enabled", (False,), "there is no teacher"),
    Refused("skip.*.enable", (False,), "every rollout is sampled anew"),
    Refused("actor_rollout_ref.hybrid_engine", (True,), "set trainer.rollout_gpus to have other GPUs generate"),
    Refused(f"{_ROLLOUT}.nnodes", (0,), "set trainer.rollout_gpus to have other GPUs generate"),
    Refused(f"{_ROLLOUT}.scheduling_policy", ("fcfs",), "requests are served in their order"),
    Refused(f"{_ROLLOUT}.over_sample_rate", (0,), "every sample is waited for"),
    Refused(f"{_ROLLOUT}.quantization", (None,), _FLOATS),
    Refused(f"{_ROLLOUT}.quantization_config_file", (None,), _FLOATS),
    Refused(f"{_ROLLOUT}.disaggregation.enabled", (False,), "a GPU that generates does both prefill and decoding"),
    Refused(f"{_ROLLOUT}.router_config_path", (None,), "prompts are dealt to the GPUs by load"),
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
    *(
        Refused(f"{_ROLLOUT}.multi_turn.{name}", (None,), "multi-turn rollouts are not supported yet")
        for name in (
            *("max_assistant_turns", "max_user_turns"),
            *("tool_config_path", "function_tool_path", "interaction_config_path"),
        )
    ),
    *(
        Refused(f"data.{name}", (None,), "multi-turn rollouts are not supported yet")
        for name in ("tool_config_path", "function_tool_path")
    ),
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
    Refused(f"{_ROLLOUT}.engine_kwargs.vexact.max_cache_blocks", (None,), f"set {_ROLLOUT}.num_pages"),
    Refused(f"{_ROLLOUT}.engine_kwargs.vexact.attn_impl", (None,), f"set {_ROLLOUT}.attn_impl"),
    Refused(
        f"{_ROLLOUT}.engine_kwargs.*",
        (None, {}),
        "no engine has keys of its own; those of every rollout lie directly in the rollout section",
    ),
    *(
        Refused(
            f"{_REF}.{section}ulysses_sequence_parallel_size",
            (None, 1),
            f"the reference policy takes {_ACTOR}.ulysses_sequence_parallel_size",
        )
        for section in ("", "fsdp_config.")
    ),
    Refused(f"{_ACTOR}.entropy_from_logits_with_chunking", (False, True), "the entropy is always computed in chunks"),
    Refused(
        f"{_ACTOR}.fsdp_config.offload_policy",
        (False,),
        f"it steps on the CPU, whose bits are others; set {_ACTOR}.fsdp_config.param_offload and .optimizer_offload",
    ),
    Refused(f"{_ACTOR}.fsdp_config.fsdp_size", (-1,), "weights are sharded over all GPUs that train"),
    *(
        Refused(f"{section}.strategy", ("fsdp", "fsdp2"), "only FSDP2 is built in")
        for section in (f"{_ACTOR}.fsdp_config", _REF, f"{_REF}.fsdp_config")
    ),
    *(
        Refused(f"{section}.qat.enable", (False,), _FLOATS)
        for section in (_ACTOR, f"{_ACTOR}.fsdp_config", f"{_REF}.fsdp_config", _ROLLOUT)
    ),
    Refused(f"{_ACTOR}.calculate_sum_pi_squared", (False,), "no algorithm.adv_estimator here reads it"),
    Refused(f"{_ACTOR}.freeze_vision_tower", (False,), "only text is supported"),
    Refused(f"{_ACTOR}.optim.optimizer", ("AdamW",), _ADAMW),
    Refused(f"{_ACTOR}.optim.optimizer_impl", ("torch.optim",), _ADAMW),
    Refused(f"{_ACTOR}.optim.override_optimizer_config", (None, {}), _ADAMW),
    Refused(f"{_ACTOR}.optim.total_training_steps", (-1, None), "set trainer.total_training_steps"),
    Refused(f"{_ACTOR}.optim.num_cycles", (0.5,), "cosine goes down once, from lr to min_lr_ratio"),
    Refused(f"{_ACTOR}.optim.zero_indexed_step", (True,), "the rate of the first step is the one at step 0"),
    Refused(f"{_MODEL}.lora_rank", (0,), _LORA),
    Refused(f"{_MODEL}.lora_adapter_path", (None,), f"{_LORA}; merge the adapter into the checkpoint"),
    Refused(f"{_MODEL}.lora.rank", (0,), _LORA),
    Refused(f"{_MODEL}.hf_config_path", (None,), f"config.json lies in {_MODEL}.path"),
    Refused(f"{_MODEL}.tiled_mlp.enabled", (False,), "the operators must be the ones the rollout uses"),
    *(
        Refused(f"{section}.mtp.enable", (False,), "layers that predict later tokens are not trained")
        for section in (_MODEL, _ROLLOUT)
    ),
    Refused(f"{_MODEL}.trust_remote_code", (False,), "models are defined here; code from a checkpoint is never run"),
    Refused("data.trust_remote_code", (False,), "code from a checkpoint is never run"),
    Refused(f"{_MODEL}.use_remove_padding", (True,), "sequences are always packed without padding"),
    Refused(f"{_MODEL}.use_liger", (False,), "the operators must be the ones the rollout uses"),
    Refused(f"{_MODEL}.enable_activation_offload", (False,), "offloading is not supported yet"),
    Refused(f"{_MODEL}.external_lib", (None,), "nothing is patched from outside"),
    *(
        Refused(f"{section}.enable", (None, False), _REWARD_MODEL)
        for section in ("reward.reward_model", "reward_model")
    ),
    Refused("reward.reward_manager.source", (None, "register"), "use reward.custom_reward_function"),
    Refused("reward.reward_manager.module.path", (None,), "use reward.custom_reward_function"),
    *(
        Refused(f"reward_model.reward_loop_{name}", (None,), "use reward.custom_reward_function")
        for name in ("source", "module_path", "class_name")
    ),
    Refused(
        "reward.sandbox_fusion.url",
        (None,),
        "there is no sandbox client; call yours from reward.custom_reward_function",
    ),
    Refused("data.audio_key", (None, "audios"), "only text is supported"),
    Refused("data.image_key", (None, "images"), "only text is supported"),
    Refused("data.video_key", (None, "videos"), "only text is supported"),
    Refused("global_profiler.tool", (None, "torch"), "traces are torch.profiler's"),
    Refused("model_engine", ("dp", "fsdp", "fsdp2"), "only FSDP2 is built in"),
)
