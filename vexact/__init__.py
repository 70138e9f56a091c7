"""Exact reinforcement learning for language models: what is sampled is what is trained, bit for bit.

Importing this package does no work: no other module, no environment, no device is touched.
"""

TYPE_CHECKING = False  # importing typing would be work

if TYPE_CHECKING:
    from vexact.swaps import make_invariant

__version__ = "0.1.0"
__all__ = ["__version__", "make_invariant"]


def __getattr__(name: str) -> object:
    if name == "make_invariant":
        from vexact.swaps import make_invariant

        return make_invariant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
