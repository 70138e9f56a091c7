"""Rules across keys, and the start-up plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vexact.config import Config, ConfigError, load_config
from vexact.config.memory import ModelShape, kv_cache_tokens
from vexact.config.plan import build_plan

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "train.jsonl").touch()
    return [f"actor_rollout_ref.model.path={tmp_path}", f"data.train_files={tmp_path}/train.jsonl"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{ACTOR}.ppo_mini_batch_size=12"], "does not divide data.train_batch_size=32"),
        ([f"{ACTOR}.ppo_mini_batch_size=12"], "try 8"),
        ([f"{ACTOR}.ppo_mini_batch_size=64"], "try 32"),
        ([f"{ROLLOUT}.n=1"], "grpo compares the samples of a prompt"),
        (
            [f"{ROLLOUT}.max_model_len=600"],
            "is less than data.max_prompt_length + data.max_response_length = 512 + 512 = 1024",
        ),
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=1000"], "cannot hold one sequence of 1024 tokens"),
        (
            [f"{ACTOR}.ppo_max_token_len_per_gpu=300", f"{ACTOR}.ulysses_sequence_parallel_size=3"],
            "parallel_size) cannot hold one sequence of 1024 tokens (data.max_prompt_length + "
            "data.max_response_length); set it to at least 342",
        ),
        (
            [f"{ACTOR}.ulysses_sequence_parallel_size=3", "trainer.n_gpus_per_node=4"],
            "=3 does not divide the 4 training GPU(s)",
        ),
        (
            [f"{ACTOR}.fsdp_config.expert_parallel_size=4", "trainer.n_gpus_per_node=6"],
            "fsdp_config.expert_parallel_size=4 does not divide the 6 training GPU(s) (trainer.nnodes x "
            "trainer.n_gpus_per_node); try 3, or train on a multiple of 4 GPUs",
        ),
        ([f"{ROLLOUT}.num_pages=15"], "set it to at least 16"),
        ([f"{ROLLOUT}.num_pages=99", f"{ROLLOUT}.kv_cache_bytes=9"], "both size the key-value cache"),
        ([f"{ROLLOUT}.enable_chunked_prefill=false", f"{ROLLOUT}.max_num_batched_tokens=9"], "turn chunking on"),
        (
            [f"{ROLLOUT}.dtype=bf16", f"{ACTOR}.fsdp_config.dtype=fp32"],
            "differ: trainer and rollout compute in one type",
        ),
        (
            [f"{ROLLOUT}.dtype=bf16", f"{ACTOR}.fsdp_config.dtype=fp32", "trainer.exactness=warn"],
            "differ: trainer and rollout compute in one type",
        ),
        ([f"{ROLLOUT}.val_kwargs.do_sample=true"], "with temperature=0 is greedy"),
        ([f"{ROLLOUT}.val_kwargs.n=4"], "greedy samples would all be equal"),
        ([f"{ACTOR}.optim.betas=[0.9]"], "AdamW takes two"),
        ([f"{ACTOR}.clip_ratio=1.0"], "must be below 1"),
        (["trainer.resume_mode=resume_path"], "resume_path needs a path"),
        (["trainer.save_freq=0"], "use -1 for never"),
        (["trainer.val_only=true"], "needs data.val_files"),
        (["data.val_files=nowhere.parquet"], "data.val_files=nowhere.parquet: no such file"),
        (["reward.custom_reward_function.path=nowhere.py"], "nowhere.py: no such file"),
        (["reward.reward_kwargs.overlong_buffer_cfg.enable=true"], "must lie between 1 and"),
        (["actor_rollout_ref.model.path=nowhere"], "no config.json there"),
    ],
)
def test_contradiction_is_named(base: list[str], overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([*base, *overrides])
    assert expected in str(caught.value)


def test_missing_model_and_data_say_how_to_get_them() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([])
    assert "vexact prepare tiny" in str(caught.value)
    assert "reasoning_gym:" in str(caught.value)


def test_unequal_types_are_allowed_in_a_deliberate_baseline(base: list[str]) -> None:
    assert load_config([*base, f"{ROLLOUT}.dtype=bf16", "trainer.exactness=warn"]).rollout.dtype == "bfloat16"


def test_attention_pair_that_cannot_agree_gets_one_warning(base: list[str]) -> None:
    assert load_config(base).notices == ()
    notices = load_config([*base, f"{ROLLOUT}.attn_impl=sdpa"]).notices
    assert len(notices) == 1
    assert "sdpa (rollout) with triton-invariant (trainer)" in notices[0]


def test_unknown_attention_lists_the_known_ones(base: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"attn_impl=flash: unknown attention implementation; known: triton-invariant, sdpa"
    ):
        load_config([*base, f"{ROLLOUT}.attn_impl=flash"])


def test_mini_batch_defaults_to_the_batch(base: list[str]) -> None:
    config = load_config([*base, "data.train_batch_size=12"])
    assert (config.mini_batch_prompts, config.optimizer_steps_per_rollout) == (12, 1)
    config = load_config([*base, "data.train_batch_size=12", f"{ACTOR}.ppo_mini_batch_size=4", f"{ACTOR}.ppo_epochs=2"])
    assert config.optimizer_steps_per_rollout == 6


def test_seeds_follow_the_one_seed_unless_set(base: list[str]) -> None:
    config = load_config([*base, "trainer.seed=3", "data.seed=4"])
    assert (config.data_seed, config.rollout_seed) == (4, 3)


def test_model_shape_counts_parameters_like_the_model() -> None:
    from vexact.models import ModelConfig, random_model

    sizes = {
        **TINY,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
    }
    model = random_model(ModelConfig.from_hf_dict(sizes), seed=0)
    exact = sum(parameter.numel() for parameter in model.parameters())
    qk_norms = 2 * TINY["num_hidden_layers"] * TINY["head_dim"]  # type: ignore[operator]
    assert ModelShape.of(sizes).num_parameters == exact - qk_norms


def test_plan_counts_and_advises(base: list[str]) -> None:
    config = load_config([*base, f"{ACTOR}.ppo_mini_batch_size=8", "data.train_batch_size=16", "trainer.save_freq=5"])
    plan = build_plan(config, "cpu")
    rows = dict(plan.rows)
    assert rows["step"] == "16 prompts x 8 samples = 128 sequences"
    assert rows["updates"] == "2 optimizer steps per rollout, 1 of 2 exactly on-policy"
    assert "data.train_batch_size=16" in rows["changed keys"]
    assert rows["run directory"] == "runs/vexact/default"
    assert len(plan.advice) == 1
    assert "only 1 of 2 updates" in plan.advice[0]


@pytest.mark.parametrize("more", ["batch_invariant=false", "mismatch.mode=noise"])
def test_plan_calls_no_update_on_policy_whose_samples_are_not_exact(base: list[str], more: str) -> None:
    plan = build_plan(load_config([*base, f"{ROLLOUT}.{more}", f"{ACTOR}.ppo_mini_batch_size=8"]), "cpu")
    expected = f"4 optimizer steps per rollout, none exactly on-policy (actor_rollout_ref.rollout.{more})"
    assert dict(plan.rows)["updates"] == expected
    assert not any("exactly on-policy" in sentence for sentence in plan.advice)


@pytest.mark.parametrize("later", [f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.ppo_epochs=2"])
def test_plan_says_that_kept_tokens_are_those_of_the_sampler(base: list[str], later: str) -> None:
    def said(*more: str) -> bool:
        plan = build_plan(load_config([*base, *more]), "cpu")
        return any(sentence.startswith("with top_k, top_p or min_p") for sentence in plan.advice)

    assert said(later, f"{ROLLOUT}.top_p=0.9")
    assert not said(later)
    assert not said(f"{ROLLOUT}.top_p=0.9")


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ("lr=0", "no weight ever changes"),
        ("lr_warmup_steps=4", "still rises when the run ends: 4 steps of warm-up of 4 in all"),
        ("lr_warmup_steps_ratio=1.0", "still rises when the run ends: 4 steps"),
        ("lr_warmup_steps=3", ""),
        ("lr_warmup_steps_ratio=0.9", ""),
    ],
)
def test_plan_says_when_the_learning_rate_is_never_reached(base: list[str], optim: str, said: str) -> None:
    more = "trainer.total_training_steps=4", "trainer.save_freq=1", f"{ACTOR}.optim.{optim}"
    advice = build_plan(load_config([*base, *more]), "cpu").advice
    assert len(advice) == bool(said)
    assert said in " ".join(advice)


def test_plan_says_that_a_kl_counts_twice(base: list[str]) -> None:
    both = "algorithm.use_kl_in_reward=true", f"{ACTOR}.use_kl_loss=true"
    for more in ((), both[:1], both[1:], both):
        said = any("counts twice" in note for note in build_plan(load_config([*base, *more]), "cpu").advice)
        assert said == (more == both)


def test_plan_warns_of_a_cache_smaller_than_a_sequence(base: list[str]) -> None:
    plan = build_plan(load_config([*base, f"{ROLLOUT}.kv_cache_bytes=10000"]), "cpu")
    assert any("holds 64 tokens, less than one sequence of 1024" in sentence for sentence in plan.advice)


def test_cache_tokens_follow_type_pages_and_demand() -> None:
    shape = ModelShape.of(TINY)  # 32 values per token: 128 bytes in float32, 64 in bfloat16
    assert kv_cache_tokens(Config(), "cuda", shape) is None
    small = load_config([f"{ROLLOUT}.kv_cache_bytes=65536"], checked=False)
    assert (kv_cache_tokens(small, "cpu", shape), kv_cache_tokens(small, "cuda", shape)) == (512, 1024)
    few = load_config([f"{ROLLOUT}.max_num_seqs=1"], checked=False)
    assert kv_cache_tokens(few, "cpu", shape) == 1024


def test_plan_names_a_checkpoint_that_is_no_decoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ConfigError, match="has no 'num_hidden_layers'"):
        ModelShape.read(str(tmp_path))


UNUSED = {
    f"{ACTOR}.kl_loss_coef": ("0.5", [f"{ACTOR}.use_kl_loss=true"]),
    "algorithm.kl_ctrl.kl_coef": ("0.5", ["algorithm.use_kl_in_reward=true"]),
    "algorithm.filter_groups.metric": ("acc", ["algorithm.filter_groups.enable=true"]),
    "algorithm.gamma": ("0.9", ["algorithm.adv_estimator=reinforce_plus_plus"]),
    "algorithm.rollout_correction.rollout_is_threshold": ("3.0", ["algorithm.rollout_correction.rollout_is=token"]),
    f"{ACTOR}.loss_scale_factor": ("5", [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm"]),
    f"{ACTOR}.optim.min_lr_ratio": ("0.5", [f"{ACTOR}.optim.lr_scheduler_type=cosine"]),
    "reward.reward_kwargs.overlong_buffer_cfg.len": ("5", ["reward.reward_kwargs.overlong_buffer_cfg.enable=true"]),
    "trainer.best_metric_mode": ("min", ["trainer.best_metric=critic/score/mean"]),
    "trainer.profile_ranks": ("[]", ["trainer.profile_steps=[1]"]),
    "trainer.audit_redraw_ratio": ("0.5", []),
    "data.truncation": ("left", []),
    f"{ACTOR}.clip_ratio": ("0.3", []),
    "algorithm.norm_adv_by_std_in_grpo": ("False", []),
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": ("16384", [f"{ACTOR}.use_kl_loss=true"]),
    "trainer.total_epochs": ("3", []),
    f"{ROLLOUT}.val_kwargs.top_p": (
        "0.5",
        [f"{ROLLOUT}.val_kwargs.do_sample=true", f"{ROLLOUT}.val_kwargs.temperature=1"],
    ),
}


@pytest.mark.parametrize("key", UNUSED)
def test_a_key_without_effect_says_so_and_one_with_does_not(base, key):
    value, needed = UNUSED[key]
    off = {
        "trainer.audit_redraw_ratio": ["trainer.exactness=off"],
        "data.truncation": ["data.filter_overlong_prompts=true"],
        f"{ACTOR}.clip_ratio": [f"{ACTOR}.clip_ratio_low=0.2", f"{ACTOR}.clip_ratio_high=0.2"],
        "algorithm.norm_adv_by_std_in_grpo": ["algorithm.adv_estimator=rloo"],
        "trainer.total_epochs": ["trainer.total_training_steps=3"],
    }
    (said,) = load_config([*base, f"{key}={value}", *off.get(key, [])]).notices
    assert said.startswith(f"{key}={value} has no effect: ")
    assert load_config([*base, f"{key}={value}", *needed]).notices == ()


def test_the_kwargs_of_no_function_are_named(base):
    (said,) = load_config([*base, "reward.custom_reward_function.reward_kwargs={a: 1}"]).notices
    assert said.startswith("reward.custom_reward_function.reward_kwargs")
    assert said.endswith(" has no effect: reward.custom_reward_function.path is null")


@pytest.mark.parametrize("name", ["/abs", "../../etc", "a/../../b"])
def test_a_name_stays_in_runs(base, name, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.experiment_name=.* leads out of runs/"):
        load_config([*base, f"trainer.experiment_name={name}"])
    assert load_config([*base, f"trainer.experiment_name={name}", f"trainer.default_local_dir={tmp_path}/r"])
    assert load_config([*base, "trainer.experiment_name=qwen/a..b"])


def test_a_run_directory_of_nobody_is_not_made(base):
    with pytest.raises(ConfigError, match="default_local_dir=~nobody-of-that-name/x: nobody's home directory"):
        load_config([*base, "trainer.default_local_dir=~nobody-of-that-name/x"])
    assert load_config([*base, "trainer.default_local_dir=./~nobody-of-that-name/x"])
