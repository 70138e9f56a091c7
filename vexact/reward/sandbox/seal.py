"""All protections of one grader process, put on in order; what cannot be had is named, not assumed."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence

from vexact.reward.sandbox import landlock, linux, seccomp
from vexact.reward.sandbox.policy import SandboxPolicy

_GIB = 1 << 30
_MAX_FILE_BYTES = 1 * _GIB
_WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def seal(policy: SandboxPolicy, scratch: str, protected: Sequence[int]) -> dict[str, str]:
    """Give up, in this process and all it will start, what ``policy`` does not grant.

    Args:
        scratch: the folder that may be written.
        protected: process ids of driver and warden, which may not be signalled.

    Returns:
        Protections that this machine cannot give, each with the reason; empty when all hold.
    """
    writable = [scratch, *_WRITABLE_DEVICES, *map(os.path.expanduser, policy.write)]
    steps: dict[str, Callable[[], None]] = {
        "limits": lambda: _limit(policy.memory_gb),
        "capabilities": linux.drop_capabilities,
        "privileges": linux.forbid_new_privileges,
        "files": lambda: landlock.restrict(writable, isolate_sockets=policy.network == "none"),
        "network": lambda: seccomp.restrict(policy.network, protected),
    }
    lacking = {}
    for name, step in steps.items():
        try:
            step()
        except (OSError, ValueError, KeyError) as error:
            lacking[name] = str(error)
    return lacking


def _limit(memory_gb: float | None) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, _MAX_FILE_BYTES)
    if memory_gb is not None:
        # Private writable memory, not address space: mapped libraries and CUDA's reservations cost nothing.
        _lower(resource.RLIMIT_DATA, int(memory_gb * _GIB))
    with open("/proc/self/oom_score_adj", "w") as file:  # the kernel ends a grader before the trainer
        file.write("1000")


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))
