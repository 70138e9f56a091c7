"""Proof that rollout and training agree."""

from vexact.audit.audit import Audit, DrawError, ExactnessError
from vexact.audit.compare import Comparison, compare

__all__ = ["Audit", "Comparison", "DrawError", "ExactnessError", "compare"]
