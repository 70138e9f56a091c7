"""Tables that tell the programs of one launch what each of them works on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy of ``values`` for which the host does not wait: from pageable memory it would wait for the stream."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host
    pinned = torch.empty_like(host, pin_memory=True)
    pinned.numpy()[...] = values  # torch would wake its threads for it, which takes longer than the copy
    return pinned.to(device, non_blocking=True)
