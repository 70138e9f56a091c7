"""verl's keys: honoured at a harmless value, refused with the reason otherwise, moved or dropped with a notice."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from vexact.config import ConfigError, load_config
from vexact.config.checks.verl import MOVED, REFUSED, UNUSED, moved_keys, translate
from vexact.config.fields import leaves
from vexact.config.schema import Keys

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (f"{ROLLOUT}.tensor_model_parallel_size=2", "replica of the engine; remove it or set"),
        ("critic.enable=true", "there is no critic"),
        ("actor_rollout_ref.model.lora.rank=8", "LoRA"),
        ("actor_rollout_ref.actor.optim.optimizer=SGD", "AdamW"),
        ("distillation.enabled=true", "there is no teacher"),
        ("skip.rollout.enable=true", "sampled anew"),
        ("trainer.default_hdfs_dir=hdfs://a", "default_local_dir only"),
        ("actor_rollout_ref.hybrid_engine=false", "set trainer.rollout_gpus"),
        ("reward_model.enable=true", "reward models are not supported"),
        ("algorithm.adv_estimator=gae", "GAE needs a critic"),
        ("algorithm.adv_estimator=remax", "not built in"),
        (f"{ROLLOUT}.multi_turn.enable=true", "multi-turn"),
        (f"{ROLLOUT}.multi_turn.tool_config_path=t.yaml", "multi-turn"),
        ("actor_rollout_ref.model.lora_rank=8", "LoRA"),
        (f"{ROLLOUT}.calculate_log_probs=False", "are the old log-probabilities"),
        ("trainer.nnodes=0", "must be >= 1"),
        (f"{ROLLOUT}.name=sglang", "there is no bridge to it"),
        (f"{ROLLOUT}.engine_kwargs.vexact.max_cache_blocks=9", f"set {ROLLOUT}.num_pages"),
        (f"{ROLLOUT}.min_tokens=4", "forbids stop tokens at first"),
        (f"{ROLLOUT}.repetition_penalty=1.1", "could not repeat"),
        (f"{ROLLOUT}.val_kwargs.presence_penalty=0.5", "could not repeat"),
        (f"{ROLLOUT}.allowed_token_ids=[1,2]", "could not repeat"),
        (f"{ROLLOUT}.logit_bias.5=1", "could not repeat"),
        (f"{ROLLOUT}.prompt_logprobs=1", "nothing here reads them"),
        ("algorithm.rollout_correction.rollout_is=geometric", "expected token | sequence or null"),
        ("actor_rollout_ref.model.trust_remote_code=true", "never run"),
        ("actor_rollout_ref.actor.strategy=megatron", "only FSDP2"),
    ],
)
def test_refused_with_the_reason(override: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override], checked=False)
    text = str(caught.value)
    assert reason in text
    assert override.partition("=")[0] in text


@pytest.mark.parametrize(
    "override",
    [
        f"{ROLLOUT}.tensor_model_parallel_size=1",
        "critic.enable=False",
        f"{ROLLOUT}.multi_turn.enable=False",
        "actor_rollout_ref.model.lora_rank=0",
        f"{ROLLOUT}.calculate_log_probs=True",
        f"{ROLLOUT}.repetition_penalty=1.0",
        f"{ROLLOUT}.val_kwargs.min_tokens=0",
        f"{ROLLOUT}.bad_words=[]",
        "trainer.nnodes=1",
        "trainer.critic_warmup=0",
        "trainer.default_hdfs_dir=null",
        "actor_rollout_ref.hybrid_engine=True",
        f"{ROLLOUT}.engine_kwargs.vllm={{}}",
        "actor_rollout_ref.model.lora.rank=0",
        "reward_model.enable=False",
        "custom_reward_function.name=null",
        "reward_model.reward_manager=null",
        "actor_rollout_ref.actor.optim.warmup_style=null",
        "actor_rollout_ref.model.use_remove_padding=True",
        "algorithm.rollout_correction.rollout_is=null",
        "algorithm.rollout_correction.rollout_rs=null",
        "algorithm.rollout_correction.rollout_is_threshold=2.0",
    ],
)
def test_harmless_value_is_accepted_in_silence(override: str) -> None:
    config = load_config([override], checked=False)
    assert config.notices == ()
    assert config.changed() == {}


def test_a_flag_is_not_a_size_of_one() -> None:
    with pytest.raises(ConfigError):
        translate(f"{ROLLOUT}.tensor_model_parallel_size", True)


def test_unused_key_is_dropped_with_a_notice() -> None:
    config = load_config(["ray_kwargs.ray_init.num_cpus=4", "trainer.balance_batch=True"], checked=False)
    assert config.changed() == {}
    assert any(notice.startswith("ray_kwargs.ray_init.num_cpus=4 has no effect") for notice in config.notices)
    assert len(config.notices) == 2


def test_keys_without_effect_for_one_reason_share_a_notice() -> None:
    roles = ("actor", "rollout", "ref")
    keys = [f"actor_rollout_ref.{role}.profiler.{name}" for role in roles for name in ("enable", "all_ranks")]
    config = load_config([*(f"{key}=True" for key in keys), "global_profiler.steps=[1,2]"], checked=False)
    assert config.trainer.profile_steps == (1, 2)
    told = "have no effect: trainer.profile_steps and .profile_ranks say what is traced"
    (notice,) = [notice for notice in config.notices if told in notice]
    assert all(f"{key}=True" in notice for key in keys)


def test_moved_keys_land_where_the_schema_has_them() -> None:
    config = load_config(["trainer.max_actor_ckpt_to_keep=5", "custom_reward_function.path=my.py"], checked=False)
    assert config.trainer.keep_last == 5
    assert config.reward.custom_reward_function.path == "my.py"
    ours = [leaf.key for leaf in leaves(Keys)]
    assert set(moved_keys(ours).values()) <= set(ours)
    assert set(MOVED) == {theirs for theirs in MOVED if any(key.startswith(theirs) for key in moved_keys(ours))} | {
        "sandbox_fusion",
        "reward_model.sandbox_fusion",
    }, "the others lead to a key"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("actor_rollout_ref.actor.optim.clip_grad=0.5", "actor_rollout_ref.actor.grad_clip", 0.5),
        (
            "actor_rollout_ref.actor.optim.warmup_style=cosine",
            "actor_rollout_ref.actor.optim.lr_scheduler_type",
            "cosine",
        ),
        (f"{ROLLOUT}.response_length=9", "data.max_response_length", 9),
        ("reward_model.num_workers=3", "reward.num_workers", 3),
        (
            "+custom_reward_function.reward_kwargs.scale=2",
            "reward.custom_reward_function.reward_kwargs.scale",
            2,
        ),
        (
            "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True",
            "reward.reward_kwargs.overlong_buffer_cfg.enable",
            True,
        ),
        ("reward_model.overlong_buffer.len=9", "reward.reward_kwargs.overlong_buffer_cfg.len", 9),
        ("+reward_model.reward_kwargs.max_resp_len=99", "reward.reward_kwargs.max_resp_len", 99),
    ],
)
def test_a_key_or_a_whole_section_of_verl_lies_somewhere_else(override: str, key: str, value: object) -> None:
    config = load_config([override], checked=False)
    assert config.changed() == {key: value}
    theirs = override.removeprefix("+").partition("=")[0]
    assert f"{theirs} is called {key} here" in config.notices


def test_one_key_under_both_spellings_has_one_value(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    both = "actor_rollout_ref.actor.grad_clip: {}\nactor_rollout_ref.actor.optim.clip_grad: {}\n"
    recipe.write_text(both.format(0.5, 0.5))
    assert load_config([f"recipe={recipe}"], checked=False).actor.grad_clip == 0.5
    recipe.write_text(both.format(0.5, "null"))
    assert load_config([f"recipe={recipe}"], checked=False).actor.grad_clip == 0.5
    recipe.write_text(both.format(0.5, 1.0))
    with pytest.raises(
        ConfigError, match=r"optim.clip_grad and .*grad_clip are the same key, and the recipe gives two"
    ):
        load_config([f"recipe={recipe}"], checked=False)


def test_no_table_shadows_a_key_of_ours() -> None:
    """Nor would a pattern take a misspelt one for a key of verl's."""
    ours = [leaf.key for leaf in leaves(Keys)]
    assert [(key, entry.key) for entry in (*REFUSED, *UNUSED) for key in ours if fnmatchcase(key, entry.key)] == []
    assert set(ours).isdisjoint(MOVED)


@pytest.mark.parametrize(
    "override",
    ["actor_rollout_ref.ref.fsdp_config.parm_offload=true", "actor_rollout_ref.actor.checkpoint.async_sav=true"],
)
def test_a_misspelt_key_is_not_taken_for_one_without_effect(override: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key .* did you mean"):
        load_config([override], checked=False)


def test_a_verl_grpo_script_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train.parquet").touch()
    config = load_config(
        [
            "algorithm.adv_estimator=grpo",
            f"data.train_files={tmp_path}/train.parquet",
            "data.train_batch_size=1024",
            "data.max_prompt_length=512",
            "data.max_response_length=1024",
            "data.filter_overlong_prompts=True",
            "data.truncation='error'",
            f"actor_rollout_ref.model.path={tmp_path}",
            "actor_rollout_ref.actor.optim.lr=1e-6",
            "actor_rollout_ref.model.use_remove_padding=True",
            "actor_rollout_ref.actor.ppo_mini_batch_size=256",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
            "actor_rollout_ref.actor.use_kl_loss=True",
            "actor_rollout_ref.actor.kl_loss_coef=0.001",
            "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
            "actor_rollout_ref.actor.entropy_coeff=0",
            "actor_rollout_ref.model.enable_gradient_checkpointing=True",
            "actor_rollout_ref.actor.fsdp_config.param_offload=False",
            "actor_rollout_ref.actor.fsdp_config.optimizer_offload=False",
            f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=32",
            f"{ROLLOUT}.tensor_model_parallel_size=1",
            f"{ROLLOUT}.name=vexact",
            f"{ROLLOUT}.gpu_memory_utilization=0.6",
            f"{ROLLOUT}.n=5",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32",
            "actor_rollout_ref.ref.fsdp_config.param_offload=False",
            "algorithm.use_kl_in_reward=False",
            "trainer.critic_warmup=0",
            'trainer.logger=["console","wandb"]',
            "trainer.project_name=verl_grpo_example_gsm8k",
            "trainer.n_gpus_per_node=1",
            "trainer.nnodes=1",
            "trainer.save_freq=20",
            "trainer.test_freq=5",
            "trainer.total_epochs=15",
        ]
    )
    assert (config.sequences_per_step, config.optimizer_steps_per_rollout) == (5120, 4)
    assert config.needs_reference


def test_a_verl_dapo_script_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train.parquet").touch()
    config = load_config(
        [
            f"data.train_files={tmp_path}/train.parquet",
            f"actor_rollout_ref.model.path={tmp_path}",
            "data.truncation=left",
            "data.max_prompt_length=2048",
            "data.max_response_length=8192",
            "data.gen_batch_size=96",
            "data.train_batch_size=32",
            "algorithm.adv_estimator=grpo",
            "algorithm.kl_ctrl.kl_coef=0.0",
            "algorithm.filter_groups.enable=True",
            "algorithm.filter_groups.metric=acc",
            "algorithm.filter_groups.max_num_gen_batches=10",
            "actor_rollout_ref.actor.clip_ratio_low=0.2",
            "actor_rollout_ref.actor.clip_ratio_high=0.28",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=10",
            "actor_rollout_ref.actor.ppo_mini_batch_size=32",
            "actor_rollout_ref.actor.fsdp_config.fsdp_size=-1",
            f"{ROLLOUT}.log_prob_use_dynamic_bsz=True",
            f"{ROLLOUT}.val_kwargs.temperature=1.0",
            f"{ROLLOUT}.val_kwargs.do_sample=True",
            f"{ROLLOUT}.multi_turn.format=hermes",
            "reward_model.reward_manager=dapo",
            "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True",
            "+reward_model.reward_kwargs.overlong_buffer_cfg.len=4096",
            "+reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0",
            "+reward_model.reward_kwargs.overlong_buffer_cfg.log=False",
            "+reward_model.reward_kwargs.max_resp_len=8192",
            "+trainer.val_before_train=True",
            "trainer.resume_mode=auto",
            "trainer.log_val_generations=10",
        ]
    )
    assert config.reward.reward_kwargs.overlong_buffer_cfg.enable
    assert config.reward.reward_manager.name == "dapo"
    assert config.overlong_length == 8192
