"""Tells verl of the rollout, of the training engine, and of the CPU."""

from __future__ import annotations

import os
from importlib.metadata import entry_points, version

NAME = "vexact"
VERSIONS = "0.9.1", "0.10"  # the first one that works, and the first that nobody has tried
EXTERNAL_LIB = "vexact_verl.actor"


def register() -> None:
    """The rollout, and with ``VERL_PLATFORM=cpu`` the platform. The engine waits for ``model.external_lib``: its
    imports take seconds, and most processes build no model.

    Raises RuntimeError for a verl of another version.
    """
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    require_version()
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from vexact_verl import platform_cpu  # noqa: F401  (registers itself)
    _ROLLOUT_REGISTRY[NAME, "async"] = "vexact_verl.adapter.VexactAdapter"
    RolloutReplicaRegistry.register(NAME, _replica)


def register_engine() -> None:
    """``actor.strategy=vexact``; ``triton-invariant`` attention for the Hugging Face models in verl's own FSDP engines;
    and these engines on the CPU."""
    from verl.utils.device import get_device_name
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    from vexact.ops import hf
    from vexact_verl.engine import VexactEngine

    hf.register()
    EngineRegistry.register("language_model", NAME, device=["cpu", "cuda"])(VexactEngine)
    if get_device_name() == "cpu":
        EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)


def require_version() -> None:
    from packaging.version import Version

    found, (first, beyond) = version("verl"), VERSIONS
    if not Version(first) <= Version(found) < Version(beyond):
        raise RuntimeError(f"verl {found} is installed; vexact-verl works with verl >= {first}, < {beyond}")


def problems() -> list[str]:
    """Why verl would not find vexact in this process; empty when it would."""
    found = []
    if not any(point.name == NAME for point in entry_points(group="verl.plugins")):
        found.append("no entry point `vexact` in the group `verl.plugins`; install it: pip install submodules/verl")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip()
    if policy.lower() != "auto" and NAME not in [name.strip() for name in policy.split(",")]:
        found.append(f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading it; unset it, or add vexact")
    try:
        require_version()
        from verl.workers.rollout.base import _ROLLOUT_REGISTRY, get_rollout_class
        from verl.workers.rollout.replica import RolloutReplicaRegistry

        if (NAME, "async") not in _ROLLOUT_REGISTRY:
            return [*found, "verl has loaded, but does not know rollout.name=vexact"]
        get_rollout_class(NAME)
        RolloutReplicaRegistry.get(NAME)
        from verl.workers.engine import EngineRegistry

        import vexact_verl.actor  # noqa: F401  (as model.external_lib does)

        EngineRegistry.get_engine_cls("language_model", NAME)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def _replica() -> type:
    from vexact_verl.replica import VexactReplica

    return VexactReplica
