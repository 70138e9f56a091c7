"""Where a proof was made: versions, device, and the constants of the kernels."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vexact.ops

_PACKAGES = ("vexact", "torch", "triton", "transformers", "numpy", "safetensors", "tokenizers")
_CONSTANTS = ("kernels/linear/tile*.py", "kernels/attention/launch.py")
"""Files that decide which tile shapes and key blocks run, relative to the operators."""


def environment(device: torch.device) -> dict[str, object]:
    """Versions, device, CUDA and threads."""
    cuda = device.type == "cuda"
    return {
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({_cpu_name()})",
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    """The processor's name where Linux says it, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tile_table_hash() -> str:
    """SHA-256 over the kernel constants, by file name and content: equal hashes mean equal tiles."""
    root = Path(os.path.dirname(vexact.ops.__file__))
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _CONSTANTS for file in root.glob(pattern)):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
