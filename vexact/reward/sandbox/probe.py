"""A reward function that tries what graders may not do, for ``vexact doctor``."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """1.0 for each thing that is refused. ``ground_truth`` is a folder outside the scratch folder."""
    info = extra_info or {}
    return {
        "score": 1.0,
        "files": _is_refused(lambda: open(os.path.join(ground_truth, "written"), "w").close()),
        "network": _is_refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()),
        "signals": _is_refused(lambda: os.kill(info["driver"], 0)),
        "memory": _is_refused(lambda: bytearray(info["bytes"])),
        "child": float(subprocess.Popen(["sleep", "60"], start_new_session=True).pid),
    }


def _is_refused(attempt: Any) -> float:
    try:
        attempt()
    except (OSError, MemoryError):
        return 1.0
    return 0.0
