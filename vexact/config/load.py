"""Defaults, recipe, environment and command line to one checked `Config`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from vexact.config.checks.rules import attention_notices, check, inexact
from vexact.config.checks.unused import unused_notices
from vexact.config.checks.verl import here, moved_keys
from vexact.config.fields import UNSET, ConfigError, build, convert, flatten, leaves, unknown_keys
from vexact.config.recipe import read_recipe
from vexact.config.schema import Config, Keys
from vexact.config.spelling import typographic
from vexact.config.unknown import settle
from vexact.config.values import is_literal, parse, takes_text

_PACKAGE = Path(__file__).resolve().parents[1]
_BASELINE = "{} cannot be exact, so trainer.exactness is warn: differences are counted and the run goes on"
_STRICT = "; set trainer.exactness=strict to stop at the first one"
_PATHS = {
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.tokenizer_path",
    "actor_rollout_ref.model.custom_chat_template",
    "data.train_files",
    "data.val_files",
    "reward.custom_reward_function.path",
    "reward.sandbox.write",
    "trainer.default_local_dir",
    "trainer.resume_from_path",
}
_OVERRIDE = re.compile(r"^(\+\+|\+)?([A-Za-z_][\w.@/-]*)=(.*)$", re.DOTALL)


def configs_dir() -> Path:
    """The Hydra tree: `vexact/configs` in an installed wheel, `configs/` beside the package in a source tree."""
    shipped, source = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    return shipped if shipped.is_dir() else source


def recipes() -> list[str]:
    """Names that `recipe=` takes."""
    return sorted(path.stem for path in (configs_dir() / "recipe").glob("*.yaml"))


def load_config(overrides: Sequence[str] = (), config_name: str = "train", *, checked: bool = True) -> Config:
    """Compose, translate, type and check a configuration.

    Args:
        overrides: `dotted.key=value` in Hydra's syntax, later ones win; `recipe=NAME` or `recipe=FILE.yaml` picks a
            recipe, which overrides the defaults and is overridden by the other entries. A leading + or ++ is accepted.
        config_name: the file in the Hydra tree to start from.
        checked: also require that files exist and keys agree with each other.

    Raises:
        ConfigError: anything is wrong with it.
    """
    pairs = _parse(overrides)
    composed, notices = _compose(pairs, config_name)
    values, further = _translate(composed)
    notices += further
    config = _build(values)
    if checked:
        check(config)
        notices += unused_notices(config)
        warnings = attention_notices(config)
    else:
        warnings = []
    baseline, strict = inexact(config), config.trainer.exactness == "strict"
    if strict and not config.rollout.is_own and "trainer.exactness" in dict(pairs):
        raise ConfigError(
            f"trainer.exactness=strict: {baseline} samples with other arithmetic than the trainer's, and would stop at "
            "the first token; set trainer.exactness=warn, or leave it out"
        )
    if baseline and strict and "trainer.exactness" not in dict(pairs):
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, exactness="warn"))
        warnings = [_BASELINE.format(baseline) + (_STRICT if config.rollout.is_own else "")]
    notices += warnings
    return dataclasses.replace(config, notices=tuple(notices))


def _build(values: Mapping[str, Any]) -> Config:
    keys = build(Keys, values)
    return Config(**{item.name: getattr(keys, item.name) for item in dataclasses.fields(Keys)})


def _parse(overrides: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in overrides:
        if text.startswith("~"):
            raise ConfigError(f"{text}: a key cannot be removed; set it to its default instead")
        match = _OVERRIDE.match(text)
        if match is None:
            raise ConfigError(
                f"{text!r} is not an override; write key=value, e.g. trainer.total_training_steps=20{typographic(text)}"
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ConfigError(f"{text!r}: its bytes are not UTF-8")
        pairs.append((match[2], match[3]))
    return pairs


def _compose(pairs: list[tuple[str, str]], config_name: str) -> tuple[dict[str, Any], list[str]]:
    """Nested plain values, and a notice for every key that has another name here.

    Unknown keys are let through: the schema judges them, not Hydra. A text in which ``${`` starts no reference is put
    in after references are resolved, which would stop at it.
    """
    recipe = next((value for key, value in reversed(pairs) if key == "recipe"), "")
    from_file = recipe.endswith((".yaml", ".yml"))
    tree = deepcopy(_tree(config_name, "" if from_file else recipe))
    hints = _hints()
    settings = _once(_recipe_file(recipe, hints)) if from_file else []
    for key, text in pairs:
        if key != "recipe":
            settings += _under(key, parse(key, text, hints.get(key, UNSET)), hints)
    settings = [(key, value) for key, value in settings if value is not None or not _is_unset(key)]
    literal: dict[str, Any] = {}
    for key, value in settings:
        ours = here(key)
        literal.pop(ours, None)
        if takes_text(hints.get(key, UNSET)) and is_literal(value):
            literal[ours] = value
        else:
            _put(tree, ours, value)
    composed = tree if _is_resolved(tree) else _resolved(tree)
    for key, value in literal.items():
        _put(composed, key, value)
    moved = dict.fromkeys(key for key, _ in settings if here(key) != key)
    return composed, [f"{key} is called {here(key)} here" for key in moved]


def _is_resolved(value: Any) -> bool:
    """Whether OmegaConf, which takes longer than all else here, would give back what it was given."""
    if isinstance(value, str):
        return "${" not in value
    if isinstance(value, dict):
        return all(type(key) is str and _is_resolved(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_resolved, value))
    return value is None or isinstance(value, (bool, int, float))


def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """With the values that its references stand for."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error}".strip()) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@lru_cache(maxsize=1)
def _hints() -> dict[str, Any]:
    """The type of every key, under its verl spelling too, where null may stand for a key that is not given."""
    ours = {leaf.key: leaf.hint for leaf in leaves(Keys)}
    return ours | {theirs: ours[key] | None for theirs, key in moved_keys(ours).items()}


def _is_unset(key: str) -> bool:
    """Whether null under verl's spelling means that the key is not given."""
    hints = _hints()
    return here(key) != key and here(key) in hints and convert(None, hints[here(key)]) is UNSET


def _under(key: str, value: Any, hints: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The keys that ``section={key: value}`` sets."""
    whole = not isinstance(value, Mapping) or not value or key in hints
    return [(key, value)] if whole else list(flatten({key: value}).items())


def _once(recipe: dict[str, Any]) -> list[tuple[str, Any]]:
    """The keys of a recipe; of one under both spellings, ours."""
    twice = [key for key in recipe if here(key) != key and here(key) in recipe]
    for key in twice:
        value = recipe[key]
        is_reference = isinstance(value, str) and "${" in value
        if value is not None and not is_reference and value != recipe[here(key)]:
            raise ConfigError(
                f"{key} and {here(key)} are the same key, and the recipe gives two values; keep one of them"
            )
    return [(key, value) for key, value in recipe.items() if key not in twice]


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; a mapping adds to the one that is there."""
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    old = tree.get(name)
    tree[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value


@lru_cache(maxsize=8)
def _tree(config_name: str, recipe: str) -> Any:
    """The files of the tree composed by Hydra, without any override and with references as they are written."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    if recipe and recipe not in recipes():
        raise ConfigError(
            f"recipe={recipe}: no such recipe; known: {', '.join(recipes())}, or a .yaml file of your own"
        )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        composed = compose(config_name, overrides=[f"recipe={recipe}"] if recipe else [])
    return yaml.safe_load(OmegaConf.to_yaml(composed))


def _recipe_file(name: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    if not Path(os.path.expanduser(name)).is_file():
        raise ConfigError(f"recipe={name}: no such file; known recipes: {', '.join(recipes())}")
    return read_recipe(name, hints)


def _translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys that the schema has, nested, and notices of those that are dropped."""
    keys = {leaf.key for leaf in leaves(Keys)}
    flat = flatten(values, whole=keys)
    unknown = {key: flat.pop(key) for key in unknown_keys(Keys, values)}
    notices, problems = settle(unknown)
    problems += [
        f"{key}={value!r}: a path holds no NUL" for key, value in flat.items() if key in _PATHS and _has_nul(value)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return _nest({key: _at_home(value) if key in _PATHS else value for key, value in flat.items()}), notices


def _has_nul(value: Any) -> bool:
    return any(isinstance(item, str) and "\0" in item for item in (value if isinstance(value, list) else [value]))


def _at_home(value: Any) -> Any:
    """``~/`` of a path means the home directory; a shell does not expand it inside ``section.key=~/path``."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return str(Path(os.path.expanduser(value))) if isinstance(value, str) and value.startswith("~/") else value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested
