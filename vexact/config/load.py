"""Defaults, recipe, environment and command line to one checked `Config`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vexact.config.checks import attention_notices, check
from vexact.config.fields import ConfigError, build, flatten, leaves, nearest, unknown_keys
from vexact.config.schema import Config, Keys
from vexact.config.verl_compat import translate

_PACKAGE = Path(__file__).resolve().parents[1]
_BASELINE = (
    "actor_rollout_ref.rollout.batch_invariant=false is a deliberate baseline, so trainer.exactness is warn; "
    "set trainer.exactness=strict to stop at the first difference"
)
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
    if (
        not config.rollout.batch_invariant
        and config.trainer.exactness == "strict"
        and "trainer.exactness" not in dict(pairs)
    ):
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, exactness="warn"))
        notices.append(_BASELINE)
    if checked:
        check(config)
        notices += attention_notices(config)
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
            raise ConfigError(f"{text!r} is not an override; write key=value, e.g. trainer.total_training_steps=20")
        pairs.append((match[2], match[3]))
    return pairs


def _compose(pairs: list[tuple[str, str]], config_name: str) -> dict[str, Any]:
    """Nested plain values. Every key is forced in (++), so that the schema, not Hydra, judges unknown ones."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    recipe = next((value for key, value in reversed(pairs) if key == "recipe"), None)
    settings = [_hydra_override(key, value) for key, value in pairs if key != "recipe"]
    from_file = recipe is not None and recipe.endswith((".yaml", ".yml"))
    if recipe is not None and not from_file and recipe not in recipes():
        raise ConfigError(
            f"recipe={recipe}: no such recipe; known: {', '.join(recipes())}, or a .yaml file of your own"
        )
    group = [f"recipe={recipe}"] if recipe is not None and not from_file else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            composed: Any = compose(config_name, overrides=group + settings)
            if from_file:
                base = OmegaConf.merge(compose(config_name), _recipe_file(str(recipe)))
                OmegaConf.set_struct(base, False)
                for setting in settings:
                    key = setting.removeprefix("++").split("=", 1)[0]
                    OmegaConf.update(base, key, OmegaConf.select(composed, key), merge=False)
                composed = base
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{error}".strip()) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _hydra_override(key: str, value: str) -> str:
    """`++key=value`, quoted when Hydra's grammar would choke on an unquoted path or sentence."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    text = f"++{key}={value}"
    try:
        parsed = parser.parse_override(text)
    except HydraException as error:
        if value[:1] in "[{'\"":
            raise ConfigError(
                f"{key}={value}: unbalanced brackets or quotes; quote the argument in the shell, e.g. '{key}=[a,b]'"
            ) from error
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"++{key}='{quoted}'"
    if parsed.is_sweep_override():
        raise ConfigError(f"{key}={value}: several values; write a list as '{key}=[{value}]'")
    return text


def _recipe_file(name: str) -> Any:
    from omegaconf import OmegaConf

    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"recipe={name}: no such file; known recipes: {', '.join(recipes())}")
    return OmegaConf.load(path)


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
    return _nest(flat), notices


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
