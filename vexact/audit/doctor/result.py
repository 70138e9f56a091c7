"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the doctor's report; ``fix`` is what to do about a warning or an error."""

    name: str
    status: Literal["ok", "warning", "error"]
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<7}  {self.name}: {self.message}" + (f"; fix: {self.fix}" if self.fix else "")


def ok(name: str, message: str) -> CheckResult:
    return CheckResult(name, "ok", message)


def warning(name: str, message: str, fix: str) -> CheckResult:
    return CheckResult(name, "warning", message, fix)


def error(name: str, message: str, fix: str) -> CheckResult:
    return CheckResult(name, "error", message, fix)
