"""Whether this machine holds graders: a reward function that tries to break out is run."""

from __future__ import annotations

import os
import tempfile
import time

from vexact.audit.doctor.result import GIB, CheckResult, ok, warning
from vexact.reward.pool import RewardPool
from vexact.reward.sandbox import probe
from vexact.reward.sandbox.policy import SandboxPolicy
from vexact.reward.spec import GradeRequest, RewardSpec

_MEMORY_GB = 1.0
_HELD = {
    "network": "no network",
    "files": "no writing outside a scratch folder",
    "signals": "no signals to the run",
    "memory": "limited memory",
    "children": "nothing they start outlives them",
}
_CAUSES = {"network": "network", "files": "files", "signals": "network", "memory": "limits"}


def check_sandbox() -> CheckResult:
    """What a grader that tries everything is kept from; no key of the environment reaches it in any case."""
    found, reasons = _try_everything()
    held = [text for name, text in _HELD.items() if found[name]]
    text = f"held in their processes: {', '.join(['no keys of the environment', *held])}"
    missing = [name for name in _HELD if not found[name]]
    if not missing:
        return ok("graders", text)
    lacks = [f"{_HELD[name]}{_because(name, reasons)}" for name in missing]
    return warning(
        "graders",
        f"{text}; not held here: {'; '.join(lacks)}",
        "let graders run model-written code only in a container of its own, or use a newer kernel or container runtime",
    )


def _try_everything() -> tuple[dict[str, bool], dict[str, str]]:
    spec = RewardSpec(probe.__file__, sandbox=SandboxPolicy(memory_gb=_MEMORY_GB))
    with tempfile.TemporaryDirectory() as outside, RewardPool(1, spec) as pool:
        info = {"driver": os.getpid(), "bytes": int(2 * _MEMORY_GB * GIB)}
        score = pool.score([GradeRequest("probe", "", outside, info)])[0]
        reasons = pool.lacking
    found = {name: score.extra.get(name) == 1.0 for name in _HELD}
    return found | {"children": _is_gone(int(score.extra["child"]))}, reasons


def _because(name: str, reasons: dict[str, str]) -> str:
    reason = reasons.get(_CAUSES.get(name, ""))
    return f" ({reason})" if reason else ""


def _is_gone(pid: int, seconds: float = 2.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False
