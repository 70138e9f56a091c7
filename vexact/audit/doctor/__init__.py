"""What will work on this machine: one line per check."""

from vexact.audit.doctor.result import CheckResult

__all__ = ["CheckResult"]
