"""verl's platform for machines without a GPU, chosen by ``VERL_PLATFORM=cpu`` only: for tests and first steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

MEMORY_BYTES = 8 << 30  # what is said to be there, and free, for metrics


class _CpuModule:
    """``torch.cpu``, and the questions that verl asks of every device's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def memory_allocated(self, *_: Any) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return MEMORY_BYTES, MEMORY_BYTES

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def nothing(self, *_: Any) -> None:
        """There is no cache to empty, no device to choose."""

    empty_cache = set_device = reset_peak_memory_stats = ipc_collect = nothing


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "vexact"
    device_module = _CpuModule()  # type: ignore[assignment]

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never found by looking around, or a GPU machine might end up here

    def current_device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")  # verl makes a device of it, and of a number it would make a GPU

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        """Starts the process group, too: verl would ask for "cpu:gloo,cpu:gloo", which torch refuses.

        verl asks for the name first and then looks whether there is a group.
        """
        if not dist.is_initialized() and {"MASTER_ADDR", "RANK", "WORLD_SIZE"} <= os.environ.keys():
            dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        return "gloo"

    def ray_resource_name(self) -> str:
        return "GPU"  # verl's resource pools count nothing else: give Ray one with ray_kwargs.ray_init.num_gpus

    def ray_noset_envvars(self) -> list[str]:
        return []

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def is_ipc_supported(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def set_device(self, device_index: int) -> None: ...
    def synchronize(self, device_index: int | None = None) -> None: ...
    def set_allocator_settings(self, settings: str) -> None: ...
    def empty_cache(self) -> None: ...
    def profiler_start(self) -> None: ...
    def profiler_stop(self) -> None: ...
    def cudart(self) -> None: ...
