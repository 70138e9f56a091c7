"""Page-locked memory of the host, which a GPU copies from and to at the speed of the bus.

``cudaHostAlloc``, which is what torch calls, clears and locks page after page of 4 KiB in one thread: 2 GiB/s, or 78 s
of the first step of a run with 61 GiB of moments a rank. Here the kernel is asked for pages of 2 MiB, several threads
touch them, and CUDA is told of them: 22 GiB/s, 10 to 17 in each of four processes
(``benchmarks/trainer/page_locking.py``).
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 25  # below it torch's way is as fast, and torch keeps such memory for the next who asks
_TOUCHED_BYTES, _MOST_THREADS = 1 << 27, 8


class _Mapping(mmap.mmap):
    """Anonymous memory of this process alone; CUDA hears of its end before the kernel does."""

    address, owner = 0, 0  # where it is registered, and the process that has done so

    def __del__(self) -> None:
        if self.address and self.owner == os.getpid():
            with suppress(RuntimeError):  # a driver that is gone has forgotten it
                torch.cuda.cudart().cudaHostUnregister(self.address)


def page_locked(num_bytes: int) -> Tensor:
    """Zeros, (num_bytes,) uint8, for copies from and to the current GPU, which must have ended when they are freed.

    Raises:
        RuntimeError: the machine has no such memory left, as torch says it.
    """
    memory = _registered(num_bytes) if num_bytes >= _LEAST_BYTES else None
    if memory is None:  # or where pages cannot be registered, as in some sandboxes
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).zero_()
    return memory


def _registered(num_bytes: int) -> Tensor | None:
    """None where the kernel or CUDA does not take part."""
    try:
        mapping = _Mapping(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a fork would copy locked pages, all of them
        with suppress(OSError, AttributeError):  # a kernel without
            mapping.madvise(getattr(mmap, advice))
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as threads:
        list(threads.map(torch.Tensor.zero_, memory.split(_TOUCHED_BYTES)))
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)):
        forget_error()
        return None
    mapping.address, mapping.owner = memory.data_ptr(), os.getpid()
    return memory


def forget_error() -> None:
    """CUDA remembers the last error of a call, and torch would raise it at its next kernel, which had no part in it."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
