"""Keys of verl's that have no effect here, or none as long as a key that is refused otherwise is off."""

from __future__ import annotations

from vexact.config.checks.verl.entry import Unused

_ROLLOUT = "actor_rollout_ref.rollout"
_ACTOR = "actor_rollout_ref.actor"
_REF = "actor_rollout_ref.ref"
_MODEL = "actor_rollout_ref.model"
_PACKED = "sequences are packed up to ppo_max_token_len_per_gpu tokens, which log-probabilities do not depend on"
_ROUTES = "rollout and trainer choose the same experts, which bitwise/routes_different counts: nothing to replay"
_TRACES = "trainer.profile_steps and .profile_ranks say what is traced, by torch.profiler"
_COMPILED = "operators are compiled ahead of use"
_CHUNKED = "the entropy is always computed in chunks"
_UNPADDED = "sequences are always packed without padding"
_TEXT = "only text is supported"
_LORA = "LoRA is off"
_CLASSES = "the classes of this package are used"

UNUSED = (
    Unused("trainer.balance_batch", "micro-batches are cut without looking at GPUs and dealt to them in turn"),
    Unused("trainer.use_v1", "there is one trainer"),
    Unused("trainer.v1.*", "there is one trainer"),
    Unused("trainer.use_legacy_worker_impl", "there is one trainer"),
    Unused("trainer.max_critic_ckpt_to_keep", "there is no critic"),
    Unused("trainer.esi_redundant_time", "a run goes on from its last checkpoint"),
    Unused("trainer.ray_wait_register_center_timeout", "trainer.worker_timeout_s says how long a stage may take"),
    Unused("actor_rollout_ref.nccl_timeout", "trainer.worker_timeout_s says how long a stage may take"),
    Unused("critic.*", "there is no critic"),
    Unused("distillation.*", "there is no teacher"),
    Unused("skip.*", "every rollout is sampled anew"),
    Unused("transfer_queue.*", "samples reach the trainer directly"),
    Unused("trainer.log_val_generations", "samples are written to samples/ in the run directory"),
    Unused("trainer.rollout_data_dir", "samples are written to samples/ in the run directory"),
    Unused("trainer.validation_data_dir", "samples are written to samples/ in the run directory"),
    Unused("algorithm.kl_ctrl.horizon", "the coefficient is fixed"),
    Unused("algorithm.kl_ctrl.target_kl", "the coefficient is fixed"),
    Unused("algorithm.pf_ppo.*", "samples are not drawn anew by their scores"),
    Unused("algorithm.filter_groups.max_inflight_gen_batches", "refills ask for what is missing"),
    Unused("data.val_batch_size", "the engine batches validation prompts itself"),
    Unused("data.validation_shuffle", "the order of validation rows changes nothing"),
    Unused(f"{_REF}.log_prob_micro_batch_size*", _PACKED),
    Unused(f"{_REF}.entropy_*", "the entropy of the reference policy is not computed"),
    *(
        Unused(
            f"{_REF}.fsdp_config.{name}", f"the reference policy is sharded and computed as {_ACTOR}.fsdp_config says"
        )
        for name in (
            *("dtype", "entropy_*", "forward_only", "forward_prefetch", "fsdp_size", "full_determinism", "model_dtype"),
            *("offload_policy", "optimizer_offload", "pad_to_length*", "qat.*", "reshard_after_forward", "seed"),
            *("turbo_config.*", "use_no_sync_for_gradient_accumulation", "use_orig_params", "use_torch_compile"),
            "wrap_policy*",
        )
    ),
    Unused("data.return_raw_chat", "chats are templated while loading"),
    Unused("data.return_raw_input_ids", "chats are templated while loading"),
    Unused("data.return_full_prompt", "samples/ has the prompts"),
    Unused("data.use_shm", "files are read where they are"),
    Unused("data.return_multi_modal_inputs", _TEXT),
    Unused("data.image_patch_size", _TEXT),
    Unused("data.mm_processor_kwargs", _TEXT),
    Unused("data.dataloader_num_workers", "rows are tokenised up front"),
    Unused("data.filter_overlong_prompts_workers", "rows are tokenised in one process"),
    Unused("data.gen_batch_size", "refills ask for what is missing"),
    Unused(f"{_MODEL}.use_fused_kernels", "the loss is always fused"),
    Unused(f"{_MODEL}.fused_kernel_options.*", "the loss is always fused"),
    Unused(f"{_MODEL}.lora_alpha", _LORA),
    Unused(f"{_MODEL}.target_modules", _LORA),
    Unused(f"{_MODEL}.exclude_modules", _LORA),
    Unused(f"{_MODEL}.lora.*", _LORA),
    *(Unused(f"{section}.mtp.*", "layers that predict later tokens are not trained") for section in (_MODEL, _ROLLOUT)),
    Unused(f"{_MODEL}.tiled_mlp.*", "tiled_mlp is off"),
    Unused(f"{_MODEL}.use_shm", "files are read where they are"),
    Unused(f"{_ACTOR}.ppo_micro_batch_size*", _PACKED),
    Unused(f"{_ACTOR}.calculate_entropy", "actor/entropy is always reported"),
    Unused(f"{_ACTOR}.entropy_from_logits_chunk_size", _CHUNKED),
    Unused(f"{_ACTOR}.entropy_checkpointing", _CHUNKED),
    Unused(f"{_ACTOR}.pad_to_length*", _UNPADDED),
    Unused(f"{_REF}.pad_to_length*", _UNPADDED),
    Unused(f"{_ACTOR}.use_fused_kernels", "the loss is always fused"),
    Unused(f"{_ACTOR}.use_remove_padding", _UNPADDED),
    Unused(f"{_ACTOR}.use_prefix_grouper", "every sequence is computed whole"),
    Unused(f"{_ACTOR}.tau_*", "only the sapo loss has it"),
    *(
        Unused(f"{_ACTOR}.policy_loss.{name}", "only losses that are not built in have it")
        for name in ("clip_cov_*", "kl_cov_ratio", "ppo_kl_coef", "dro_beta")
    ),
    Unused(f"{_ACTOR}.use_dynamic_bsz", _PACKED),
    Unused(
        f"{_ACTOR}.fsdp_config.reshard_after_forward",
        "a layer's gathered weights are always given back after its forward",
    ),
    Unused(f"{_ACTOR}.fsdp_config.wrap_policy*", "every layer is sharded on its own"),
    Unused(f"{_ACTOR}.fsdp_config.use_orig_params", "FSDP2 has no other parameters"),
    Unused(f"{_ACTOR}.fsdp_config.seed", "there is one seed, trainer.seed"),
    Unused(
        f"{_ACTOR}.fsdp_config.use_no_sync_for_gradient_accumulation", "gradients are added micro-batch by micro-batch"
    ),
    Unused(f"{_ACTOR}.fsdp_config.forward_only", "the actor is trained"),
    Unused(f"{_ACTOR}.fsdp_config.entropy_*", _CHUNKED),
    Unused(f"{_ACTOR}.fsdp_config.pad_to_length*", _UNPADDED),
    *(Unused(f"{section}.qat.*", "qat is off") for section in (_ACTOR, f"{_ACTOR}.fsdp_config", _ROLLOUT)),
    Unused(f"{_ACTOR}.fsdp_config.turbo_config.*", "only FSDP2 is built in"),
    Unused(f"{_ACTOR}.fsdp_config.use_torch_compile", _COMPILED),
    Unused(f"{_ACTOR}.use_torch_compile", _COMPILED),
    Unused(f"{_REF}.use_torch_compile", _COMPILED),
    *(
        Unused(f"{_ACTOR}.checkpoint.{name}", "a checkpoint always holds model, optimizer and data position")
        for name in ("save_contents", "load_contents", "mbridge_config*", "strict")
    ),
    Unused(f"{_ACTOR}.fsdp_config.forward_prefetch", "prefetching is PyTorch's default"),
    Unused(f"{_ACTOR}.fsdp_config.full_determinism", "runs are always deterministic"),
    Unused(f"{_ACTOR}.data_loader_seed", "there is one seed, trainer.seed"),
    Unused(f"{_ROLLOUT}.full_determinism", "runs are always deterministic"),
    Unused(f"{_ACTOR}.router_replay.*", _ROUTES),
    Unused(f"{_ROLLOUT}.enable_rollout_routing_replay", _ROUTES),
    Unused(f"{_ROLLOUT}.mode", "there is one mode"),
    Unused(f"{_ROLLOUT}.disaggregation.*", "disaggregation is off"),
    Unused(f"{_ROLLOUT}.layered_summon", "weights always travel in buckets, compared bit for bit where they arrive"),
    Unused(f"{_ROLLOUT}.limit_images", _TEXT),
    Unused(f"{_ROLLOUT}.moe_load_balance_metrics_interval", "actor/moe_load_max_over_mean is always reported"),
    Unused(f"{_ROLLOUT}.multi_stage_wake_up", "the key-value cache comes back when generation begins"),
    Unused(f"{_ROLLOUT}.skip_tokenizer_init", "prompts and samples are token ids"),
    Unused(f"{_ROLLOUT}.multi_turn.*", "rollouts are single-turn"),
    Unused(f"{_ROLLOUT}.n_gpus_per_node", "rollout.nnodes is 0"),
    Unused(f"{_ROLLOUT}.load_format", "weights come from the trainer"),
    Unused(f"{_ROLLOUT}.disable_log_stats", "statistics are always reported"),
    Unused(f"{_ROLLOUT}.log_prob_*", _PACKED),
    Unused(f"{_REF}.log_prob_use_dynamic_bsz", _PACKED),
    Unused(f"{_ROLLOUT}.agent.*", "rollouts are single-turn"),
    Unused(
        f"{_ROLLOUT}.checkpoint_engine.*", "weights always travel in buckets, compared bit for bit where they arrive"
    ),
    Unused(f"{_ROLLOUT}.trace.*", "tracing is not built in"),
    Unused(f"{_ROLLOUT}.prometheus.*", "metrics go to trainer.logger"),
    Unused("global_profiler.*", _TRACES),
    *(
        Unused(f"{section}.profiler.*", _TRACES)
        for section in (_ACTOR, _ROLLOUT, _REF, "actor_rollout_ref", "reward.reward_model")
    ),
    *(
        Unused(f"{section}.{name}", "there is no reward model")
        for section, model in (("reward.reward_model", "model_path"), ("reward_model", "model.*"))
        for name in (model, "enable_resource_pool", "n_gpus_per_node", "nnodes", "rollout.*")
    ),
    Unused("reward.reward_manager.module.name", "reward.reward_manager.module.path is null"),
    Unused("reward.reward_kwargs.overlong_buffer_cfg.log", "critic/rewards is the score after the penalty"),
    Unused("reward.sandbox_fusion.max_concurrent", "there is no sandbox client"),
    Unused("reward.sandbox_fusion.memory_limit_mb", "there is no sandbox client"),
    Unused("reward_model.launch_reward_fn_async", "reward.num_workers processes grade"),
    Unused("reward_model.strategy", "there is no reward model"),
    Unused("*._target_", _CLASSES),
    Unused("ray_kwargs.*", "trainer.ray_address names the cluster, and RAY_* variables set it up"),
)
