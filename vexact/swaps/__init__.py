"""Our operators in the place of a transformers model's own, on one instance: nothing outside of it changes."""

from vexact.swaps.invariant import make_invariant
from vexact.swaps.operators import check_operators

__all__ = ["check_operators", "make_invariant"]
