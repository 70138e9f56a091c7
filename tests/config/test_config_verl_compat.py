"""verl's keys: honoured at a harmless value, refused with the reason otherwise, moved or dropped with a notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from vexact.config import ConfigError, load_config
from vexact.config.checks.verl_compat import MOVED, REFUSED, UNUSED, translate
from vexact.config.fields import leaves
from vexact.config.schema import Keys

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (f"{ROLLOUT}.tensor_model_parallel_size=2", "replica of the engine; remove it or set"),
        ("critic.model.path=x", "there is no critic"),
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
        (f"{ROLLOUT}.response_length=9", "set data.max_response_length"),
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


def test_verls_profilers_are_dropped_with_a_notice() -> None:
    roles = ("actor", "rollout", "ref")
    keys = [f"actor_rollout_ref.{role}.profiler.{name}" for role in roles for name in ("enable", "all_ranks")]
    config = load_config([*(f"{key}=True" for key in keys), "global_profiler.steps=[1,2]"], checked=False)
    assert config.trainer.profile_steps == (1, 2)
    told = "has no effect: trainer.profile_steps and .profile_ranks say what is traced"
    assert [any(f"{key}=True {told}" in notice for notice in config.notices) for key in keys] == [True] * len(keys)


def test_moved_keys_land_where_the_schema_has_them() -> None:
    config = load_config(["trainer.max_actor_ckpt_to_keep=5", "custom_reward_function.path=my.py"], checked=False)
    assert config.trainer.keep_last == 5
    assert config.reward.custom_reward_function.path == "my.py"
    assert set(MOVED.values()) <= {leaf.key for leaf in leaves(Keys)}


def test_no_table_shadows_a_key_of_ours() -> None:
    ours = {leaf.key for leaf in leaves(Keys)}
    assert ours.isdisjoint({entry.key for entry in (*REFUSED, *UNUSED)} | set(MOVED))


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
