"""What Python's garbage collector walks while steps run."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Has the collector pass over all that is there now, until ``gc.unfreeze()``.

    A full collection walks what PyTorch, transformers and Triton hold, for tenths of a second in which this process
    launches nothing, and ranks that wait for it in every layer do neither. What is there when steps begin is there to
    stay; what else is dropped goes as ever, unless it lies in a cycle.
    """
    gc.collect()  # what is garbage by now would stay
    gc.freeze()
