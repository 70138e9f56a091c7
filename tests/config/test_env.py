"""Environment variables become overrides, or one clear message."""

from __future__ import annotations

import pytest

from vexact import attention, env
from vexact.config import load_config


def test_attention_variables() -> None:
    assert env.attention_overrides({}) == []
    found = env.attention_overrides({"INFER_FA_IMPL": "sdpa", "VEOMNI_ATTN_IMPLEMENTATION": "triton-invariant"})
    assert found == [
        "actor_rollout_ref.rollout.attn_impl=sdpa",
        "actor_rollout_ref.actor.attn_implementation=triton-invariant",
    ]


ACTOR_VARIABLES = ("VEOMNI_ATTN_IMPLEMENTATION", "VEOMNI_ATTN_IMPL", "ATTN_IMPL")


@pytest.mark.parametrize("variable", ACTOR_VARIABLES)
def test_every_spelling_of_the_trainers_attention_is_read(variable: str) -> None:
    expected = ["actor_rollout_ref.actor.attn_implementation=sdpa"]
    assert env.attention_overrides({variable: "sdpa"}) == expected
    assert env.attention_overrides({variable: " sdpa\n", "INFER_FA_IMPL": " "}) == expected
    with pytest.raises(ValueError, match=f"{variable}=fa9: unknown attention"):
        env.attention_overrides({variable: "fa9"})


def test_spellings_that_disagree_are_named_and_those_that_agree_are_one() -> None:
    assert len(env.attention_overrides(dict.fromkeys(ACTOR_VARIABLES, "sdpa"))) == 1
    assert len(env.attention_overrides({"ATTN_IMPL": "sdpa", "VEOMNI_ATTN_IMPL": ""})) == 1
    for one in ACTOR_VARIABLES:
        for other in set(ACTOR_VARIABLES) - {one}:
            with pytest.raises(ValueError, match="one setting with two values") as caught:
                env.attention_overrides({one: "sdpa", other: "triton-invariant"})
            assert f"{one}=sdpa" in str(caught.value)
            assert f"{other}=triton-invariant" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fa9", "INFER_FA_IMPL=fa9: unknown attention implementation; known: triton-invariant"),
        ("fa-invariant-cute", "needs the package flash_attn.cute, which is not installed"),
        ("fa-invariant", "needs the package flash_attn_interface, which is not installed"),
    ],
)
def test_unusable_attention_says_why(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_installed", lambda package: False)
    with pytest.raises(ValueError, match="INFER_FA_IMPL") as caught:
        env.attention_overrides({"INFER_FA_IMPL": name})
    assert expected in str(caught.value)


def test_only_two_invariant_implementations_of_one_name_agree() -> None:
    assert attention.attention_warning("triton-invariant", "triton-invariant") is None
    assert attention.attention_warning("sdpa", "sdpa") is not None
    assert attention.attention_warning("fa-invariant", "triton-invariant") is not None


def test_paths() -> None:
    assert env.path_overrides({}) == []
    assert env.path_overrides({"model_dir": "m", "train_path": "t", "test_path": "v"}) == [
        "actor_rollout_ref.model.path=m",
        "data.train_files=t",
        "data.val_files=v",
    ]
    with pytest.raises(ValueError, match="set model_dir to a Hugging Face checkpoint"):
        env.path_overrides({"train_path": "t"})


@pytest.mark.parametrize("path", ["/data/a,b/c=d", "/my models/x", "C'est", "'quoted'", "\"x\" and 'y'", "/größe/[1]"])
def test_paths_with_odd_characters_arrive_as_they_are(path: str) -> None:
    config = load_config(env.path_overrides({"model_dir": path, "train_path": path}), checked=False)
    assert (config.model.path, config.data.train_files) == (path, (path,))


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_variable_is_unset(blank: str) -> None:
    assert env.attention_overrides(dict.fromkeys(("INFER_FA_IMPL", *ACTOR_VARIABLES), blank)) == []
    assert env.path_overrides(dict.fromkeys(("model_dir", "train_path", "test_path"), blank)) == []
    assert env.wandb_mode({"WANDB_MODE": blank, "WANDB_API_KEY": blank}) == "offline"
    assert not env.has_wandb_key({"WANDB_API_KEY": blank})
    assert not env.debug({"VEXACT_DEBUG": blank})
    assert env.ray_auth_mode({"RAY_AUTH_MODE": blank}) == ""
    assert env.cache_dir({"VEXACT_CACHE": blank, "XDG_CACHE_HOME": blank}) == env.cache_dir({})
    waiting = {"OMP_WAIT_POLICY": blank, "OMP_NUM_THREADS": blank}
    env.set_process_defaults(waiting)
    assert waiting == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_what_wandb_reads_itself_is_tidied() -> None:
    variables = {"WANDB_MODE": "", "WANDB_ENTITY": " ", "WANDB_PROJECT": " p ", "WANDB_DIR": "/w", "OTHER": ""}
    env.tidy_wandb(variables)
    assert variables == {"WANDB_PROJECT": "p", "WANDB_DIR": "/w", "OTHER": ""}


def test_wandb_never_prompts() -> None:
    assert env.wandb_mode({"WANDB_MODE": " offline "}) == "offline"
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
