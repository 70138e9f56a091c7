"""VeOmni models on vexact's operators, unpatched: its kernel slots, and modules exchanged on the instance."""

from vexact_veomni.convert import convert
from vexact_veomni.slots import NAME, ops_implementation, register

__all__ = ["NAME", "convert", "ops_implementation", "register"]
