"""Rollouts and training sides that other packages add, by entry points. This package imports none of them itself."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

ROLLOUTS = "vexact.rollouts"  # name -> module of a vexact.rollout.protocol.RolloutPlugin
VERIFY_BACKENDS = "vexact.verify_backends"  # name -> function like vexact.audit.verify.sides.load_side
_BRIDGES = {  # what submodules/ has: how it is installed from a source tree
    (ROLLOUTS, "vllm"): "pip install 'submodules/vllm[cpu]' (on a GPU machine [gpu])",
    (VERIFY_BACKENDS, "veomni"): "pip install submodules/veomni",
}


def installed(group: str) -> dict[str, list[EntryPoint]]:
    """The providers of every name, one each if all is well. A package that is found twice counts once."""
    found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, {})[_package(entry), entry.value] = entry
    return {name: list(found[name].values()) for name in sorted(found)}


def load(group: str, name: str, setting: str, own: tuple[str, ...]) -> Any:
    """What an installed package provides as ``name``.

    Args:
        group: ``ROLLOUTS`` or ``VERIFY_BACKENDS``.
        setting: what the user gave, up to the name, for the messages.
        own: the names that need no further package.

    Raises:
        ValueError: no package provides the name, or several do, or importing it fails.
    """
    found = installed(group)
    providers = found.get(name, [])
    if not providers:
        raise ValueError(_absent(group, name, setting, [*own, *found]))
    if len(providers) > 1:
        packages = " and ".join(_package(entry) for entry in providers)
        raise ValueError(f"{setting}={name}: {packages} both provide it; uninstall one of them")
    try:
        return providers[0].load()
    except Exception as error:  # of any class: whatever a foreign package does when it is imported
        raise ValueError(
            f"{setting}={name}: {_package(providers[0])} provides it as {providers[0].value}, but importing that "
            f"failed: {type(error).__name__}: {error}"
        ) from error


def load_rollout(name: str) -> Any:
    """The ``RolloutPlugin`` that ``actor_rollout_ref.rollout.name`` names.

    Raises:
        ValueError: see ``load``; or it is no rollout.
    """
    setting = "actor_rollout_ref.rollout.name"
    plugin = load(ROLLOUTS, name, setting, ("vexact",))
    lacking = [part for part in ("check", "build") if not callable(getattr(plugin, part, None))]
    if lacking:
        raise ValueError(f"{setting}={name}: {plugin!r} is no rollout: it has no {' and no '.join(lacking)}()")
    return plugin


def _absent(group: str, name: str, setting: str, known: list[str]) -> str:
    message = f"{setting}={name}: no installed package provides it; there is {', '.join(known)}"
    how = _BRIDGES.get((group, name))
    if how is not None:
        return f"{message}. From this project's source tree: {how}"
    near = difflib.get_close_matches(name, [*known, *(bridge for of, bridge in _BRIDGES if of == group)], n=1)
    return f"{message}; did you mean {near[0]}?" if near else message


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
