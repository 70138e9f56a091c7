"""Environment variables become overrides, or one clear message."""

from __future__ import annotations

import pytest

from vexact import env


def test_attention_variables() -> None:
    assert env.attention_overrides({}) == []
    found = env.attention_overrides({"INFER_FA_IMPL": "sdpa", "VEOMNI_ATTN_IMPLEMENTATION": "triton-invariant"})
    assert found == [
        "actor_rollout_ref.rollout.attn_impl=sdpa",
        "actor_rollout_ref.actor.attn_implementation=triton-invariant",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fa9", "INFER_FA_IMPL=fa9: unknown attention implementation; known: triton-invariant"),
        ("fa-invariant-cute", "needs the package flash_attn.cute, which is not installed"),
        ("fa-invariant", "needs the package flash_attn_interface, which is not installed"),
    ],
)
def test_unusable_attention_says_why(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_installed", lambda package: False)
    with pytest.raises(ValueError, match="INFER_FA_IMPL") as caught:
        env.attention_overrides({"INFER_FA_IMPL": name})
    assert expected in str(caught.value)


def test_only_two_invariant_implementations_of_one_name_agree() -> None:
    assert env.attention_warning("triton-invariant", "triton-invariant") is None
    assert env.attention_warning("sdpa", "sdpa") is not None
    assert env.attention_warning("fa-invariant", "triton-invariant") is not None


def test_paths() -> None:
    assert env.path_overrides({}) == []
    assert env.path_overrides({"model_dir": "m", "train_path": "t", "test_path": "v"}) == [
        "actor_rollout_ref.model.path=m",
        "data.train_files=t",
        "data.val_files=v",
    ]
    with pytest.raises(ValueError, match="set model_dir to a Hugging Face checkpoint"):
        env.path_overrides({"train_path": "t"})


def test_wandb_never_prompts() -> None:
    assert env.wandb_mode({}) == "offline"
    assert env.wandb_mode({"WANDB_API_KEY": "k"}) == "online"
    assert env.wandb_mode({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}) == "disabled"
    with pytest.raises(ValueError, match="WANDB_MODE=on: must be one of online, offline"):
        env.wandb_mode({"WANDB_MODE": "on"})


def test_cache_directory_precedence() -> None:
    assert env.cache_dir({"VEXACT_CACHE": "/c", "XDG_CACHE_HOME": "/x"}) == "/c"
    assert env.cache_dir({"XDG_CACHE_HOME": "/x"}) == "/x/vexact"
    assert env.cache_dir({}).endswith("/.cache/vexact")


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    empty: dict[str, str] = {}
    env.set_process_defaults(empty)
    assert empty == {"OMP_WAIT_POLICY": "PASSIVE"}
    chosen = {"OMP_WAIT_POLICY": "ACTIVE"}
    env.set_process_defaults(chosen)
    assert chosen == {"OMP_WAIT_POLICY": "ACTIVE"}
