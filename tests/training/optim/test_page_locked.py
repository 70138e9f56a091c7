"""Host memory that CUDA is told of: zeros, registered as long as it lives, and torch's own where that fails."""

import gc
import mmap
import os

import pytest
import torch

from vexact.training.optim import page_locked as module
from vexact.training.optim.page_locked import forget_error, page_locked

SIZE = (33 << 20) + 4097  # no multiple of a page


class Runtime:
    """Notes what is registered; ``code`` is what it answers."""

    def __init__(self, code=0):
        self.code, self.registered, self.seen = code, {}, []

    def cudaHostRegister(self, address, size, flags):
        self.seen.append(size)
        if not self.code:
            self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        with open("/proc/self/maps") as maps:  # still mapped: the GPU must not write to what is another's
            ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps]
        assert any(start <= address < end for start, end in ranges)
        del self.registered[address]


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


@pytest.fixture
def torchs(monkeypatch):
    """What is asked of torch; this machine's torch may be without CUDA."""
    asked, real = [], torch.empty

    def empty(size, **options):
        asked.append((size, options.pop("pin_memory")))
        return real(size, **options).fill_(7)

    monkeypatch.setattr(module.torch, "empty", empty)
    return asked


def test_memory_is_zero_registered_whole_and_unregistered_with_its_last_tensor(runtime):
    memory = page_locked(SIZE)
    assert (memory.dtype, memory.shape, int(memory.count_nonzero())) == (torch.uint8, (SIZE,), 0)
    assert runtime.registered == {memory.data_ptr(): SIZE}
    part = memory[SIZE - 8 :].fill_(3)
    del memory
    gc.collect()
    assert len(runtime.registered) == 1, "a view is left"
    assert part.tolist() == [3] * 8
    del part
    assert runtime.registered == {}


def test_a_fork_neither_inherits_nor_unregisters_it(runtime):
    memory = page_locked(SIZE)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open("/proc/self/maps") as maps:
                ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps]
            inherited = any(start <= memory.data_ptr() < end for start, end in ranges)
            del memory
            os.write(writer, f"{inherited} {len(runtime.registered)}".encode())
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert (status, os.read(reader, 100).decode()) == (0, "False 1")
    assert memory.count_nonzero() == 0
    assert len(runtime.registered) == 1


def test_what_cannot_be_registered_is_torchs(runtime, torchs, monkeypatch):
    forgotten = []
    monkeypatch.setattr(module, "forget_error", lambda: forgotten.append(1))
    runtime.code = 801
    memory = page_locked(SIZE)
    assert (runtime.seen, runtime.registered, torchs, forgotten) == ([SIZE], {}, [(SIZE, True)], [1])
    assert memory.count_nonzero() == 0


def test_what_the_kernel_does_not_map_is_torchs(runtime, torchs, monkeypatch):
    def full(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module, "_Mapping", full)
    assert page_locked(SIZE).count_nonzero() == 0
    assert (runtime.seen, torchs) == ([], [(SIZE, True)])


def test_a_kernel_without_large_pages_gives_small_ones(runtime, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")

    def refuses(self, advice):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module._Mapping, "madvise", refuses)
    assert page_locked(SIZE).count_nonzero() == 0
    assert runtime.seen == [SIZE]


def test_little_memory_is_torchs_which_keeps_it_for_the_next(runtime, torchs):
    assert page_locked(4096).count_nonzero() == 0
    assert (runtime.seen, torchs) == ([], [(4096, True)])


@pytest.mark.gpu
def test_a_gpu_copies_from_and_to_it_in_the_background():
    memory = page_locked(SIZE)
    assert memory.is_pinned()
    assert memory[4096:].is_pinned()
    numbers = torch.randint(256, (SIZE,), dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.copy_(numbers, non_blocking=True)
        back = memory.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(back, numbers)
    assert torch.equal(memory, numbers.cpu())
    address = memory.data_ptr()
    del memory
    assert int(torch.cuda.cudart().cudaHostUnregister(address)) != 0, "it was registered still"
    forget_error()


@pytest.mark.gpu
def test_an_error_that_is_forgotten_stops_no_kernel():
    memory = page_locked(SIZE)
    assert int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), SIZE, 0)) != 0
    forget_error()
    assert (torch.ones(5, device="cuda") * 2).sum().item() == 10
