"""Composition: precedence, override syntax, recipes, and what a wrong key or value says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from vexact.config import Config, ConfigError, load_config, recipes
from vexact.config.fields import UNSET, convert, leaves
from vexact.config.schema import Keys

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def load(*overrides: str) -> Config:
    return load_config(overrides, checked=False)


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def test_yaml_tree_gives_the_schema_defaults() -> None:
    assert load() == Config()


def test_saved_configuration_loads_to_the_same_one(tmp_path: Path) -> None:
    config = load(
        "trainer.seed=7",
        "trainer.logger=[console,wandb]",
        "data.train_files=[a.parquet,b.parquet]",
        "trainer.keep_last=null",
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert load(f"recipe={saved}") == config
    assert config.changed() == {
        "trainer.seed": 7,
        "trainer.logger": ["console", "wandb"],
        "data.train_files": ["a.parquet", "b.parquet"],
        "trainer.keep_last": None,
    }


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_plus_signs_mean_nothing(prefix: str) -> None:
    assert load(f"{prefix}trainer.seed=7").trainer.seed == 7


def test_later_overrides_win_over_earlier_and_over_the_recipe() -> None:
    assert load("recipe=tiny_arithmetic").trainer.experiment_name == "tiny_arithmetic"
    config = load("trainer.experiment_name=x", "recipe=tiny_arithmetic", "trainer.seed=1", "trainer.seed=2")
    assert (config.trainer.experiment_name, config.trainer.seed) == ("x", 2)


def test_last_recipe_wins() -> None:
    assert load("recipe=tiny_arithmetic", "recipe=qwen3_1b7") == load("recipe=qwen3_1b7")


def test_own_recipe_file_sits_between_defaults_and_command_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"trainer": {"seed": 5, "project_name": "p"}, "data": {"max_prompt_length": 9}}))
    config = load("trainer.seed=6", f"recipe={mine}")
    assert (config.trainer.seed, config.trainer.project_name, config.data.max_prompt_length) == (6, "p", 9)


def test_unknown_key_in_a_recipe_file_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {sead: 5}\n")
    assert "unknown key trainer.sead; did you mean trainer.seed" in message(f"recipe={mine}")


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_is_typed_and_consistent(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.parquet").touch()
    config = load_config(
        [f"recipe={name}", f"actor_rollout_ref.model.path={tmp_path}", f"data.train_files={tmp_path}/rows.parquet"]
    )
    assert config.trainer.exactness == "strict"
    assert config.optimizer_steps_per_rollout == 1


@pytest.mark.parametrize("value", ["/data/my rows/a=b (1).parquet", "reasoning_gym:chain_sum?size=20&seed=1", "b~/c"])
def test_paths_need_no_hydra_quoting(value: str) -> None:
    assert load(f"data.train_files={value}").data.train_files == (value,)
    assert load(f"data.train_files=[a.parquet, {value}]").data.train_files == ("a.parquet", value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.exactnes=off", "unknown key trainer.exactnes; did you mean trainer.exactness"),
        ("actor.lr=1", "did you mean actor_rollout_ref.actor.optim.lr"),
        ("actor_rollout_ref.rolout.temperature=1", "did you mean actor_rollout_ref.rollout.temperature"),
        ("actor_rollout_ref.rollout.topk=3", "did you mean actor_rollout_ref.rollout.top_k or"),
        ("actor_rollout_ref.rollout.min_token=3", "did you mean actor_rollout_ref.rollout.min_tokens? "),
        ("actor_rollout_ref.rollout.min_token=3", "rollout.min_tokens=3: not supported: it forbids stop tokens"),
        ("trainer.balance_batchs=true", "did you mean trainer.balance_batch? trainer.balance_batch=True has no effect"),
        ("trainer.max_actor_ckpts_to_keep=2", "did you mean trainer.keep_last?"),
        ("data.batch_size=4", "did you mean data.train_batch_size?"),
        ("data.imag_key=images", "unknown key data.imag_key; did you mean data.image_key?"),
        ("zzz.qqq=1", "unknown key zzz.qqq; docs/configuration.md lists every key"),
        ("trainer.seed=abc", "trainer.seed='abc': expected whole number, e.g. trainer.seed=8"),
        ("trainer.seed=true", "trainer.seed=True: expected whole number"),
        ("trainer.seed=1.5", "trainer.seed=1.5: expected whole number"),
        ("data.truncation=mid", "expected error | left | right | middle"),
        ("data.train_batch_size=0", "data.train_batch_size=0: must be >= 1"),
        (f"{ROLLOUT}.top_p=1.5", "must be > 0 and <= 1"),
        (
            f"{ROLLOUT}.temperature=0",
            "must be >= 0.001 and <= 1e+06 (0 is greedy: every sample of a group would be equal; near",
        ),
        ("trainer=5", "trainer is a section; set one of its keys, such as trainer.project_name"),
        ("trainer.logger=console,wandb", "write a list as 'trainer.logger=[console,wandb]'"),
        ("trainer.logger=[console", "unbalanced brackets or quotes"),
        ("trainer.logger=[console,email]", "expected list of console | jsonl | wandb | tensorboard"),
        ("trainer.seed", "'trainer.seed' is not an override; write key=value"),
        ("~trainer.seed", "a key cannot be removed"),
        ("recipe=nope", f"no such recipe; known: {', '.join(recipes())}"),
        ("recipe=nope.yaml", "recipe=nope.yaml: no such file"),
    ],
)
def test_message_names_key_value_and_fix(override: str, expected: str) -> None:
    assert expected in message(override)


def test_all_unknown_keys_are_named_at_once() -> None:
    text = message("trainer.sead=1", "data.promt_key=x")
    assert "trainer.seed" in text
    assert "data.prompt_key" in text


def test_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    config = load("actor_rollout_ref.model.path=~/m", "data.train_files=[~/a.parquet,b~/c]")
    assert (config.model.path, config.data.train_files) == ("/home/u/m", ("/home/u/a.parquet", "b~/c"))
    text = load("actor_rollout_ref.rollout.stop=[~/bin]", "data.prompt_key=~/x", "trainer.experiment_name=~/y")
    assert (text.rollout.stop, text.data.prompt_key) == (("~/bin",), "~/x")  # no paths
    assert text.trainer.experiment_name == "~/y"


def test_a_path_holds_no_nul() -> None:
    assert "trainer.default_local_dir='a\\x00b': a path holds no NUL" in message("trainer.default_local_dir=a\0b")
    assert "data.train_files=['a', 'b\\x00']: a path holds no NUL" in message("data.train_files=[a,b\0]")


@pytest.mark.parametrize("key", ["actor_rollout_ref.model.path", "data.train_files", "trainer.resume_from_path"])
def test_the_home_of_nobody_is_a_path_that_is_not_there(key, tmp_path):
    given = {"actor_rollout_ref.model.path": tmp_path, "data.train_files": tmp_path, key: "~nobody-of-that-name/x"}
    if key == "trainer.resume_from_path":
        given["trainer.resume_mode"] = "resume_path"
    with pytest.raises(ConfigError, match=f"{key}=~nobody-of-that-name/x"):
        load_config([f"{name}={value}" for name, value in given.items()])


def test_dtype_spellings() -> None:
    config = load(f"{ROLLOUT}.dtype=bf16", f"{ACTOR}.fsdp_config.dtype=bfloat16")
    assert config.rollout.dtype == config.actor.fsdp_config.dtype == "bfloat16"
    assert (Config().dtype("cpu"), Config().dtype("cuda"), config.dtype("cpu")) == ("float32", "bfloat16", "bfloat16")
    for key in (f"{ROLLOUT}.dtype", f"{ACTOR}.fsdp_config.dtype"):  # auto is the other side's
        assert load(f"{key}=bfloat16").dtype("cpu") == "bfloat16"


def test_whole_floats_are_whole_numbers_and_nothing_else_is() -> None:
    assert load("data.max_prompt_length=1e3").data.max_prompt_length == 1000
    assert convert("8", int) is UNSET
    assert convert(True, int) is UNSET
    assert convert(3, float) == 3.0


def test_deliberate_baseline_warns_instead_of_stopping_unless_told() -> None:
    config = load(f"{ROLLOUT}.batch_invariant=false")
    assert config.trainer.exactness == "warn"
    assert any("batch_invariant=false cannot be exact" in notice for notice in config.notices)
    assert load(f"{ROLLOUT}.batch_invariant=false", "trainer.exactness=strict").trainer.exactness == "strict"


def test_every_key_has_a_sentence_of_help() -> None:
    assert [leaf.key for leaf in leaves(Keys) if not leaf.metadata["help"].endswith((".", "required"))] == []


def test_no_key_is_dead() -> None:
    """Every key is read somewhere outside its declaration, except those with one possible meaning."""
    package = Path(__file__).resolve().parents[2] / "vexact"
    declared_only = {"algorithm", "data", "model", "ref", "reward", "rollout", "trainer", "checks"}
    read = {
        node.attr
        for path in package.rglob("*.py")
        if not (path.parent.name == "config" and path.stem in declared_only)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    dead = {leaf.key for leaf in leaves(Keys) if leaf.key.rsplit(".", 1)[-1] not in read}
    assert dead <= {
        f"{ACTOR}.strategy",
        f"{ACTOR}.fsdp_config.model_dtype",
        "trainer.worker_timeout_s",
    }


def test_choices_are_what_the_algorithms_register() -> None:
    import typing

    from vexact.algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES

    hints = {leaf.key: leaf for leaf in leaves(Keys)}
    estimators = typing.get_args(hints["algorithm.adv_estimator"].hint)
    losses = hints[f"{ACTOR}.policy_loss.loss_mode"]
    assert set(estimators) == set(ADVANTAGE_ESTIMATORS)
    assert {*typing.get_args(losses.hint), *losses.metadata["aliases"]} >= set(POLICY_LOSSES)
