"""Runs kernels through the installed Triton's own launchers, over a driver that only notes what it is handed.

Prints one JSON line a kernel: what the C function got in Triton's launch and in the repeated one. A script, since it
wants a process without TRITON_INTERPRET: `python launches_release.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vexact.ops.kernels import linear

handed: list[tuple[Any, ...]] = []
ordinary: list[str] = []


class TensorMap:
    def __init__(self, *said: Any) -> None:
        self.said = said


class CFunction:
    def __call__(self, *args: Any) -> None:
        handed.append(args)


launch = CFunction()


class Note:
    def __init__(self, *args: Any, **named: Any) -> None:
        self.args = args or tuple(named.values())


class Driver(nvidia.CudaDriver):  # type: ignore[misc]
    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            launch=launch,
            load_binary=lambda name, *_: (object(), abs(hash(name)) % 1000, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            fill_tma_descriptor=TensorMap,
            fill_tma_descriptor_tiled=TensorMap,
            build_signature_metadata=lambda signature: bytes(len(signature)),
        )
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: -1  # where tensors on the CPU are
        self.get_current_stream = lambda device: 7
        self.get_device_capability = lambda device=0: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def install() -> None:
    nvidia.PyCUtensorMap = TensorMap
    nvidia.PyKernelArg, nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = Note, 0, 1, 2
    nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=launch)  # Triton 3.6 compiles every launcher
    nvidia.library_dirs = lambda: []
    driver.set_active(Driver())
    run = JITFunction.run

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        ordinary.append(self.fn.__name__)
        return run(self, *args, **named)

    JITFunction.run = counted


def plain(value: Any) -> Any:
    """Addresses instead of tensors, numbers instead of descriptors; hooks and what they are told as nothing."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, TensorMap):
        return [plain(part) for part in value.said]
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if isinstance(value, Note):
        return plain(value.args)
    if type(value).__name__ in ("HookChain", "LazyDict"):
        return None
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def compare(name: str, call: Callable[[], object]) -> None:
    """Print what a call and its repetition hand over."""
    got = []
    for _ in range(2):
        handed.clear()
        ordinary.clear()
        call()
        got.append({"triton": len(ordinary), "handed": [plain(args) for args in handed]})
    sys.stdout.write(json.dumps({"name": name, "first": got[0], "second": got[1]}) + "\n")


def main() -> None:
    install()
    sizes = {"described": (64, 512, 256), "pointers": (4, 8, 6)}
    for name, (m, n, k) in sizes.items():
        a, b, out, bias = (torch.zeros(*size, dtype=torch.bfloat16) for size in ((m, k), (n, k), (m, n), (n,)))
        compare(name, partial(linear.matmul, a, b, out, layout="forward", bias=bias))


if __name__ == "__main__":
    main()
