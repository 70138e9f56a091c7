"""Which device to run on."""

from __future__ import annotations


def resolve_device(name: str) -> str:
    """Turns "auto" into "cuda" if there is a GPU, else "cpu".

    Raises:
        ValueError: "cuda" is asked for and PyTorch finds no GPU.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device=cuda: PyTorch finds no GPU here; use device=cpu or auto")
    if name == "auto":
        return "cuda" if available else "cpu"
    return name
