"""Recipe files: nested and dotted keys, text as it is written, and one place for one key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vexact.config import Config, ConfigError, load_config

ACTOR = "actor_rollout_ref.actor"
Load = Callable[[str], Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def from_text(text: str) -> Config:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config([f"recipe={path}"], checked=False)

    return from_text


@pytest.mark.parametrize(
    "text",
    [
        "trainer.total_training_steps: 3\nactor_rollout_ref.actor.optim.lr: 1e-5\n",
        "trainer: {total_training_steps: 3}\nactor_rollout_ref: {actor.optim.lr: 1e-5}\n",
        "trainer:\n  total_training_steps: 3\nactor_rollout_ref.actor:\n  optim:\n    lr: 1.0e-5\n",
        "actor_rollout_ref.actor.optim: {lr: 0.00001}\ntrainer: {total_training_steps: 3}\n",
    ],
)
def test_dots_and_nesting_mean_the_same(load: Load, text: str) -> None:
    assert load(text).changed() == {"trainer.total_training_steps": 3, f"{ACTOR}.optim.lr": 1e-5}


def test_a_section_may_be_given_in_parts(load: Load) -> None:
    config = load("trainer: {seed: 1}\ntrainer.save_freq: 2\ntrainer.keep_last: null\n")
    assert (config.trainer.seed, config.trainer.save_freq, config.trainer.keep_last) == (1, 2, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer.seed: 1\ntrainer: {seed: 2}\n", "trainer.seed is given twice, nested and with dots"),
        ("trainer: {seed: 1}\ntrainer: {save_freq: 2}\n", "trainer is given twice"),
        ("trainer: 5\ntrainer.seed: 1\n", "trainer and trainer.seed are both given"),
        ("actor_rollout_ref: {actor.optim: {lr: 1}, actor: {optim.lr: 2}}\n", f"{ACTOR}.optim.lr is given twice"),
        ("trainer.keep_last: 1\ntrainer.max_actor_ckpt_to_keep: 2\n", "are the same key"),
        ("trainer.sead: 5\n", "unknown key trainer.sead; did you mean trainer.seed"),
        ("- trainer\n", "it holds a list"),
        ("trainer\n", "it holds a single value"),
        ("trainer: [\n", "not valid YAML"),
        ("trainer.seed: 'x'\n", "trainer.seed='x': expected whole number"),
        ("trainer.experiment_name: [a]\n", "expected text"),
        ("trainer.experiment_name: null\n", "trainer.experiment_name=None: expected text"),
        ("data.shuffle: 1\n", "expected true or false"),
    ],
)
def test_a_mistake_is_named(load: Load, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "name", ["2024_10_05", "2024-10-05", "1e-3", "1_000", ".50", "on", "No", "true", "0o17", "1:30", ".inf", "1.10"]
)
def test_a_name_is_what_is_written(load: Load, name: str) -> None:
    assert load(f"trainer: {{experiment_name: {name}}}\n").trainer.experiment_name == name
    assert load(f"trainer.experiment_name: '{name}'\n").trainer.experiment_name == name
    assert load(f"actor_rollout_ref.rollout.stop: [{name}, b]\n").rollout.stop == (name, "b")
    assert load(f"data.answer_key: {name}\n").data.answer_key == name


def test_other_keys_keep_their_types(load: Load) -> None:
    config = load(
        "trainer.seed: 1_000\ndata.shuffle: off\nactor_rollout_ref.actor.optim: {lr: 1e-3, betas: [0.8, 9e-1]}\n"
        "data: {answer_key: ~, apply_chat_template_kwargs: {a.b: 1, on: yes, when: 2024-10-05}}\n"
    )
    assert (config.trainer.seed, config.data.shuffle, config.data.answer_key) == (1000, False, None)
    assert (config.actor.optim.lr, config.actor.optim.betas) == (1e-3, (0.8, 0.9))
    assert config.data.apply_chat_template_kwargs == {"a.b": 1, "on": True, "when": "2024-10-05"}


def test_a_template_in_a_block_is_text(load: Load) -> None:
    template = "{% for m in messages %}${{ m['content'] }}{% endfor %}"
    config = load(f"actor_rollout_ref.model:\n  custom_chat_template: |-\n    {template}\n")
    assert config.model.custom_chat_template == template


def test_anchors_and_references_work(load: Load) -> None:
    config = load("data: &d {seed: 3}\nactor_rollout_ref.rollout: {<<: *d, n: 2}\ntrainer.seed: ${data.seed}\n")
    assert (config.data.seed, config.rollout.seed, config.rollout.n, config.trainer.seed) == (3, 3, 2, 3)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "\ufeff{}\n"])
def test_an_empty_recipe_changes_nothing(load: Load, text: str) -> None:
    assert load(text).changed() == {}


def test_a_saved_configuration_keeps_its_texts(load: Load, tmp_path: Path) -> None:
    names = ["trainer.experiment_name=1e-3", "trainer.project_name=on", "actor_rollout_ref.rollout.stop=[1_0,null]"]
    config = load_config([*names, "actor_rollout_ref.model.custom_chat_template=${{ x }}"], checked=False)
    assert load(config.to_yaml()) == config
