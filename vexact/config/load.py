"""Defaults, recipe, environment and command line to one checked `Config`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vexact.config.checks import attention_notices, check
from vexact.config.fields import ConfigError, build, flatten, leaves, nearest, unknown_keys
from vexact.config.schema import Config, Keys
from vexact.config.verl_compat import translate
from vexact.env import attention_warning

_PACKAGE = Path(__file__).resolve().parents[1]
_BASELINE = (
    "{} cannot be exact, so trainer.exactness is warn: differences are counted and the run goes on; "
    "set trainer.exactness=strict to stop at the first one"
)
_PLAIN_LIST = re.compile(
    r"^\[[^\[\]{}'\"]*\]$"
)  # a list of texts that Hydra's grammar cannot read unquoted, such as a task
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
    values, notices = _translate(_compose(pairs, config_name))
    config = _build(values)
    if checked:
        check(config)
        warnings = attention_notices(config)
    else:
        warnings = []
    baseline = _baseline(config)
    if baseline and config.trainer.exactness == "strict" and "trainer.exactness" not in dict(pairs):
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, exactness="warn"))
        warnings = [_BASELINE.format(baseline)]
    notices += warnings
    return dataclasses.replace(config, notices=tuple(notices))


def _baseline(config: Config) -> str:
    """The setting that rules exactness out by itself; empty for none."""
    if not config.rollout.batch_invariant:
        return "actor_rollout_ref.rollout.batch_invariant=false"
    if config.rollout.mismatch.mode != "none":
        return f"actor_rollout_ref.rollout.mismatch.mode={config.rollout.mismatch.mode}"
    rollout, trainer = config.rollout.attn_impl, config.actor.attn_implementation
    return f"attention {rollout} (rollout) with {trainer} (trainer)" if attention_warning(rollout, trainer) else ""


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
            raise ConfigError(f"{text!r} is not an override; write key=value, e.g. trainer.total_training_steps=20")
        pairs.append((match[2], match[3]))
    return pairs


def _compose(pairs: list[tuple[str, str]], config_name: str) -> dict[str, Any]:
    """Nested plain values. Unknown keys are let through: the schema judges them, not Hydra."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    recipe = next((value for key, value in reversed(pairs) if key == "recipe"), "")
    from_file = recipe.endswith((".yaml", ".yml"))
    try:
        tree = OmegaConf.create(_tree(config_name, "" if from_file else recipe))
        if from_file:
            tree.merge_with(_recipe_file(recipe))
        for key, value in pairs:
            if key != "recipe":
                OmegaConf.update(tree, key, _value(key, value), force_add=True)
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error}".strip()) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@lru_cache(maxsize=8)
def _tree(config_name: str, recipe: str) -> str:
    """The files of the tree composed by Hydra, as YAML, without any override."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    if recipe and recipe not in recipes():
        raise ConfigError(
            f"recipe={recipe}: no such recipe; known: {', '.join(recipes())}, or a .yaml file of your own"
        )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return OmegaConf.to_yaml(compose(config_name, overrides=[f"recipe={recipe}"] if recipe else []))


def _value(key: str, text: str) -> Any:
    """The value of an override in Hydra's grammar; text that is no such value, like many paths, stands for itself."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        if _PLAIN_LIST.match(text):
            return [item.strip() for item in text[1:-1].split(",")]
        if text[:1] in "[{'\"":
            fix = f"quote the argument in the shell, e.g. '{key}=[a,b]'"
            raise ConfigError(f"{key}={text}: unbalanced brackets or quotes; {fix}") from error
        return text
    if parsed.is_sweep_override():
        raise ConfigError(f"{key}={text}: several values; write a list as '{key}=[{text}]'")
    return parsed.value()


def _recipe_file(name: str) -> Any:
    import yaml
    from omegaconf import DictConfig, OmegaConf

    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"recipe={name}: no such file; known recipes: {', '.join(recipes())}")
    try:
        loaded = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe={name}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"recipe={name}: must hold keys such as `trainer:`, it holds a list")
    return loaded


def _translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Resolve the keys the schema does not have; name the nearest ones of those nobody knows."""
    notices, problems = [], []
    flat = flatten(values)
    for key in unknown_keys(Keys, values):
        value = flat.pop(key)
        try:
            ours, notice = translate(key, value)
        except KeyError:
            problems.append(_unknown(key))
            continue
        except ConfigError as error:
            problems.append(str(error))
            continue
        if ours is not None:
            flat[ours] = value
        if notice is not None:
            notices.append(notice)
    if problems:
        raise ConfigError("\n".join(problems))
    return _nest({key: _at_home(value) for key, value in flat.items()}), notices


def _at_home(value: Any) -> Any:
    """``~/`` means the home directory; a shell does not expand it inside ``section.key=~/path``."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _unknown(key: str) -> str:
    near = nearest(key, [leaf.key for leaf in leaves(Keys)])
    if not near:
        return f"unknown key {key}; docs/configuration.md lists every key"
    return f"unknown key {key}; did you mean {' or '.join(near)}?"


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested
