"""Which device to run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> str:
    """Turns "auto" into "cuda" if there is a GPU, else "cpu".

    Raises:
        ValueError: "cuda" is asked for and PyTorch finds no GPU.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(_no_gpu(name, "use device=cpu or auto"))
    return name


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name, where a model can be: the CPU, a GPU that is there, or "meta".

    Raises:
        ValueError: it is none of these; the message names it and what there is.
    """
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device} is no device; name cpu, cuda or cuda:N") from None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise ValueError(_no_gpu(device, "use device=cpu"))
        if found.index is not None and found.index >= count:
            raise ValueError(f"device={device}: PyTorch finds {count} here; the last one is cuda:{count - 1}")
    elif found.type not in ("cpu", "meta"):
        raise ValueError(f"device={device}: models run on cpu and cuda only")
    return found


def _no_gpu(device: object, fix: str) -> str:
    return f"device={device}: PyTorch finds no GPU here; {fix}"
