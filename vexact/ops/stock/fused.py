"""torch's own pointwise operators, fused by its compiler: what others run on a GPU.

One kernel where ``dense.py`` launches up to ten: a baseline made of those would be slow for no reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from vexact.ops.stock import dense

NAMES = ("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "latent_rope", "swiglu")


@cache
def fused() -> dict[str, Callable[..., Any]]:
    """Compiled on first use, for one number of rows and then for any."""
    return {name: torch.compile(getattr(dense, name)) for name in NAMES}
