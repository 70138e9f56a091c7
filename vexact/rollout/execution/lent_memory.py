"""Memory that can be given back for a while and returns to the same addresses: of the KV cache, and of weights.

Captured CUDA graphs hold addresses, so the addresses are reserved once and physical memory comes and goes behind them:
on CUDA by the driver's virtual memory management, on the CPU by telling the system that the pages are not needed.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from vexact.rollout.execution.cuda_driver import CudaDriver, CudaOutOfMemory

_GIB = 2**30
_ALIGNMENT = 512  # bytes, as of an allocation of its own


class Region(Protocol):
    """A range of addresses with zeroed memory behind them."""

    def tensor(self) -> Tensor:
        """All of it, (num_bytes,) uint8; keeps the region alive."""

    def release(self) -> None:
        """Gives the physical memory back. The caller knows that nothing accesses it."""

    def resume(self) -> None:
        """Physical memory again, zeroed. Raises torch.OutOfMemoryError if there is too little; it stays released."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """What the memory is for, in words."""

    name: str
    remedy: str  # what makes room for it


KV_CACHE = Tenant("the KV cache", "lower gpu_memory_utilization (or kv_cache_bytes, num_pages)")
WEIGHTS = Tenant("the rollout's weights", "set param_offload=true")


class LentMemory:
    """``num_bytes`` of zeros on ``device`` that can be away for a while."""

    def __init__(self, num_bytes: int, device: torch.device, tenant: Tenant) -> None:
        """Raises torch.OutOfMemoryError if there is too little memory."""
        if device.type == "cuda" and device.index is None:  # the current one may be another by the time of a release
            device = torch.device("cuda", torch.cuda.current_device())
        self._device, self._tenant = device, tenant
        self._region = _region(num_bytes, device, tenant)
        if self._region is None:
            self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        else:
            self._bytes = self._region.tensor()[:num_bytes]
        self.released = False

    @property
    def bytes(self) -> Tensor:
        """(num_bytes,) uint8. Its address stays; its elements must not be accessed while ``released``."""
        return self._bytes

    def release(self) -> None:
        """Waits for the device, then gives the physical memory back. Does nothing if it is away.

        Raises RuntimeError if the device cannot bring memory back to the same addresses.
        """
        if self.released:
            return
        if self._region is None:
            raise RuntimeError(
                f"{self._tenant.name} cannot be given back: {torch.cuda.get_device_name(self._device)} has no virtual "
                "memory management (a virtual GPU?), and nothing could return to its addresses"
            )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._region.release()
        self.released = True

    def resume(self) -> None:
        """Zeros again, at the same addresses. Does nothing if it is here.

        Raises torch.OutOfMemoryError if others have taken the memory; it then stays away.
        """
        if self.released:
            assert self._region is not None
            self._region.resume()
            self.released = False


def ends(sizes: Iterable[int]) -> list[int]:
    """Where pieces of ``sizes`` bytes end that follow each other, each aligned as an allocation of its own is."""
    return list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))


def _region(num_bytes: int, device: torch.device, tenant: Tenant) -> Region | None:
    if device.type != "cuda":
        return HostRegion(num_bytes)
    torch.cuda.synchronize(device)  # the driver wants a context
    try:
        driver = CudaDriver(device.index)
    except OSError:
        return None
    if not driver.supports_virtual_memory():
        return None
    return CudaRegion(driver, num_bytes, device, tenant)


class HostRegion:
    """Anonymous memory of the process, which Linux takes back when told so and hands out zeroed on the next access."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def tensor(self) -> Tensor:
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)

    def resume(self) -> None:
        """The first access does it."""


class CudaRegion:
    """Addresses of one GPU. Freed with the last tensor that shows it."""

    def __init__(self, driver: CudaDriver, num_bytes: int, device: torch.device, tenant: Tenant) -> None:
        """Raises torch.OutOfMemoryError if there is too little memory, CudaDriverError for all else."""
        self._driver, self._device, self._tenant = driver, device, tenant
        granularity = driver.granularity()
        self._num_bytes = -(-num_bytes // granularity) * granularity
        self._address = driver.reserve(self._num_bytes)
        self._mapped: list[int] = []  # the address, while there is memory behind it; shared with the finalizer
        # at exit the process gives everything back anyway, and the driver may be gone
        weakref.finalize(self, _free, driver, device, self._address, self._num_bytes, self._mapped).atexit = False
        self.resume()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._num_bytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def tensor(self) -> Tensor:
        return torch.as_tensor(self, device=self._device)

    def release(self) -> None:
        _take_away(self._driver, self._num_bytes, self._mapped)

    def resume(self) -> None:
        handle = self._create()
        try:
            self._driver.map(self._address, self._num_bytes, handle)
        finally:
            self._driver.release(handle)  # from now on the mapping alone holds the memory
        self._mapped.append(self._address)
        try:
            self._driver.allow_access(self._address, self._num_bytes)
        except BaseException:
            self.release()
            raise
        self.tensor().zero_()

    def _create(self) -> int:
        try:
            return self._driver.create(self._num_bytes)
        except CudaOutOfMemory:
            torch.cuda.empty_cache()  # PyTorch holds on to memory that its tensors no longer need
        try:
            return self._driver.create(self._num_bytes)
        except CudaOutOfMemory as error:
            free = torch.cuda.mem_get_info(self._device)[0]
            raise torch.OutOfMemoryError(
                f"{self._num_bytes / _GIB:.2f} GiB are needed on {self._device} for {self._tenant.name}, "
                f"{free / _GIB:.2f} GiB are free; {self._tenant.remedy}, or free memory first ({error})"
            ) from error


def _take_away(driver: CudaDriver, num_bytes: int, mapped: list[int]) -> None:
    if mapped:
        driver.unmap(mapped[0], num_bytes)
        mapped.clear()


def _free(driver: CudaDriver, device: torch.device, address: int, num_bytes: int, mapped: list[int]) -> None:
    with contextlib.suppress(RuntimeError):  # after a failed kernel every call fails; the memory goes with the process
        torch.cuda.synchronize(device)
        _take_away(driver, num_bytes, mapped)
        driver.unreserve(address, num_bytes)
