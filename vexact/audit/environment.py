"""Where a proof was made: versions, device, and the constants of the kernels."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vexact.ops

_PACKAGES = ("vexact", "torch", "triton", "transformers", "numpy", "safetensors", "tokenizers")
_CONSTANTS = (
    "kernels/linear/tile*.py",
    "kernels/attention/launch.py",
    "kernels/linear_cross_entropy/launch.py",
    "kernels/moe/*.py",
)
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
    return _hash(_constant_files())


def kernel_constants() -> dict[str, str]:
    """The same for each kind of kernel by itself (attention, linear, moe, …), to say which of them are others."""
    files = _constant_files()
    kinds = sorted({file.parent.name for file in files})
    return {kind: _hash([file for file in files if file.parent.name == kind]) for kind in kinds}


def _constant_files() -> list[Path]:
    return sorted(file for pattern in _CONSTANTS for file in _root().glob(pattern))


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(_root()).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _root() -> Path:
    return Path(os.path.dirname(vexact.ops.__file__))
