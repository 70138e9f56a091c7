"""What a grader may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SandboxPolicy:
    """The default grants nothing; each field gives one thing back (``reward.sandbox.*``)."""

    network: Literal["none", "local", "all"] = "none"
    env: tuple[str, ...] = ()  # further environment variables handed to graders
    write: tuple[str, ...] = ()  # further folders or files that graders may write
    memory_gb: float | None = 4.0  # GiB of private memory per process
