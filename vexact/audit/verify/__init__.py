"""Is what is sampled what is trained, for this checkpoint? Bits first, then closeness to transformers."""

from vexact.audit.verify.report import VerifyReport
from vexact.audit.verify.run import VerifyOptions, verify

__all__ = ["VerifyOptions", "VerifyReport", "verify"]
