"""Memory that is lent, the KV cache's above all: it is given back and returns to the same addresses, zeroed."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_models import VOCAB, bits, sampled_by_graphs, tiny_model

from vexact.models import ModelConfig
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.execution import cuda_driver, lent_memory
from vexact.rollout.execution.cuda_driver import CudaDriver, CudaDriverError, CudaOutOfMemory
from vexact.rollout.execution.lent_memory import KV_CACHE, WEIGHTS, CudaRegion, LentMemory
from vexact.rollout.execution.runner import allocate_kv_caches, kv_page_bytes

MIB = 2**20
FREE = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPTS = [[1, 2, 3], list(range(40))]


def samples(engine):
    found = engine.generate(PROMPTS, FREE, ["a", "b"])
    return [(s.token_ids, bits(s.logprobs)) for s in found]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096


def test_samples_are_the_same_after_a_release_and_the_prefix_cache_is_empty():
    engine = Engine(model=tiny_model(), max_model_len=64, page_size=4)
    addresses = [tensor.data_ptr() for pair in engine._runner.kv_caches for tensor in pair]
    before = samples(engine)
    engine.generate(PROMPTS, FREE)
    engine.stats()
    for cache in [tensor for pair in engine._runner.kv_caches for tensor in pair]:
        cache.fill_(torch.nan)  # what the memory held must not matter
    assert engine.num_free_pages == engine.num_pages
    engine.release_kv_cache()
    engine.release_kv_cache()
    assert engine.kv_cache_released
    assert engine.num_free_pages == 0
    engine.resume_kv_cache()
    engine.resume_kv_cache()
    assert not engine.kv_cache_released
    assert [tensor.data_ptr() for pair in engine._runner.kv_caches for tensor in pair] == addresses
    assert samples(engine) == before
    assert engine.stats()["rollout/prefix_hit_ratio"] == 0
    engine.check_idle()


def test_a_released_cache_is_not_used_and_not_released_under_requests():
    engine = Engine(model=tiny_model(), max_model_len=64, page_size=4)
    engine.add_request([1, 2], FREE, "a")
    with pytest.raises(RuntimeError, match=r"release_kv_cache\(\) with unfinished requests: finish them, or abort_all"):
        engine.release_kv_cache()
    assert not engine.kv_cache_released
    engine.abort_all()
    engine.release_kv_cache()
    for call in (lambda: engine.generate([[1]], FREE), lambda: engine.add_request([1], FREE)):
        with pytest.raises(RuntimeError, match=r"the KV cache is released; call resume_kv_cache\(\) before generating"):
            call()
    with pytest.raises(RuntimeError, match="the KV cache is released"):
        engine._runner.kv_caches  # noqa: B018
    assert engine.step() == []
    engine.update_weights(tiny_model(3).named_parameters(), 4)  # needs no cache
    engine.resume_kv_cache()
    fresh = Engine(model=tiny_model(3), max_model_len=64, page_size=4)
    assert samples(engine) == samples(fresh)
    assert engine.weights_version == 4


def test_keys_and_values_of_different_widths_have_caches_of_their_own(monkeypatch):
    """None overlaps another, each begins aligned, and a page is counted as what it takes."""
    monkeypatch.setattr(ModelConfig, "key_dim", 24)
    monkeypatch.setattr(ModelConfig, "value_dim", 15)
    model = tiny_model(dtype=torch.bfloat16)
    memory, caches = allocate_kv_caches(model, num_pages=7, page_size=3, device=torch.device("cpu"))
    flat = [tensor for pair in caches for tensor in pair]
    assert [tuple(tensor.shape) for tensor in flat] == [(7, 3, 2, 24), (7, 3, 2, 15)] * 2
    assert all((tensor.data_ptr() - memory.bytes.data_ptr()) % 512 == 0 for tensor in flat)
    for number, tensor in enumerate(flat, 1):
        assert tensor.is_contiguous()
        assert not tensor.any()
        tensor.fill_(number)
    assert [float(tensor.min()) for tensor in flat] == [float(tensor.max()) for tensor in flat] == [1, 2, 3, 4]
    assert kv_page_bytes(model, 3) * 7 == sum(tensor.nbytes for tensor in flat)


def test_memory_of_the_host_goes_away_and_comes_back_zeroed():
    size = 96 * MIB
    memory = LentMemory(size, torch.device("cpu"), KV_CACHE)
    assert (memory.bytes.numel(), int(memory.bytes.max())) == (size, 0)
    memory.bytes.fill_(7)
    full = resident_bytes()
    memory.release()
    assert full - resident_bytes() > 0.9 * size
    memory.resume()
    assert int(memory.bytes[:: 4096 - 1].max()) == 0
    address = memory.bytes.data_ptr()
    view = memory.bytes[5:]
    del memory
    gc.collect()
    view.fill_(1)  # a tensor keeps its memory
    assert view.data_ptr() == address + 5


class FakeLibrary:
    """The driver's functions over a ledger of memory: what the real ones would refuse is a failed assertion."""

    def __init__(self, capacity=64 * MIB, fail=None):
        self.calls, self.capacity, self.fail = [], capacity, fail or {}
        self.reserved, self.sizes, self.handles, self.mapped, self.accessible = {}, {}, set(), {}, set()
        self._next = 1 << 32

    @property
    def taken(self):
        """Bytes of memory that a handle or a mapping holds."""
        return sum(self.sizes[handle] for handle in {*self.handles, *self.mapped.values()})

    def _code(self, name):
        self.calls.append(name)
        codes = self.fail.get(name, [])
        return codes.pop(0) if codes else 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        assert (attribute, device) == (102, 3)
        value._obj.value = 1
        return self._code("attribute")

    def cuMemGetAllocationGranularity(self, size, properties, option):
        self._check(properties._obj)
        size._obj.value = 2 * MIB
        return self._code("granularity")

    def cuMemAddressReserve(self, address, size, alignment, wanted, flags):
        assert size % (2 * MIB) == alignment == wanted == flags == 0
        if code := self._code("reserve"):
            return code
        self._next += 1 << 32
        address._obj.value = self._next
        self.reserved[self._next] = size
        return 0

    def cuMemCreate(self, handle, size, properties, flags):
        self._check(properties._obj)
        if code := self._code("create"):
            return code
        if self.taken + size > self.capacity:
            return 2
        self._next += 1
        handle._obj.value = self._next
        self.handles.add(self._next)
        self.sizes[self._next] = size
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):
        assert (self.reserved[address], self.sizes[handle], offset, flags) == (size, size, 0, 0)
        assert handle in self.handles
        assert address not in self.mapped
        if code := self._code("map"):
            return code
        self.mapped[address] = handle
        return 0

    def cuMemSetAccess(self, address, size, access, count):
        assert (self.reserved[address], count) == (size, 1)
        assert address in self.mapped
        assert (access._obj.location.type, access._obj.location.id, access._obj.flags) == (1, 3, 3)
        if code := self._code("access"):
            return code
        self.accessible.add(address)
        return 0

    def cuMemUnmap(self, address, size):
        assert self.reserved[address] == size
        if code := self._code("unmap"):
            return code
        del self.mapped[address]
        self.accessible.discard(address)
        return 0

    def cuMemRelease(self, handle):
        self.handles.remove(handle)
        return self._code("release")

    def cuMemAddressFree(self, address, size):
        assert self.reserved.pop(address) == size
        assert address not in self.mapped
        return self._code("free")

    def cuGetErrorName(self, code, name):
        known = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY"}
        name._obj.value = known.get(code)
        return 0 if code in known else 1

    @staticmethod
    def _check(properties):
        assert (properties.type, properties.requested_handle_types) == (1, 0)
        assert (properties.location.type, properties.location.id) == (1, 3)
        assert bytes(properties)[16:] == bytes(16)


@pytest.fixture
def no_gpu(monkeypatch):
    """What the region does with the GPU besides calling the driver, noted in a list."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (MIB, 8 * MIB))
    monkeypatch.setattr(CudaRegion, "tensor", lambda self: torch.ones(4, dtype=torch.uint8))
    return events


def region(library, num_bytes=5 * MIB, tenant=KV_CACHE):
    return CudaRegion(CudaDriver(3, library), num_bytes, torch.device("cuda", 3), tenant)


def test_the_structures_have_the_sizes_of_the_drivers():
    assert ctypes.sizeof(cuda_driver._Properties) == 32
    assert ctypes.sizeof(cuda_driver._Access) == 12


def test_the_driver_is_called_in_order_and_everything_is_given_back(no_gpu):
    library = FakeLibrary()
    held = region(library)
    ((address, size),) = library.reserved.items()
    assert size == 6 * MIB  # whole pages
    assert held.__cuda_array_interface__["data"] == (address, False)
    assert held.__cuda_array_interface__["shape"] == (size,)
    bring = ["create", "map", "release", "access"]
    assert library.calls == ["granularity", "reserve", *bring]
    held.release()
    assert (library.taken, library.mapped, library.reserved) == (0, {}, {address: size})
    held.resume()
    assert library.accessible == {address}
    assert library.taken == size
    assert library.calls[6:] == ["unmap", *bring]
    del held
    gc.collect()
    assert library.calls[11:] == ["unmap", "free"]
    assert no_gpu == ["synchronize"]  # before the last tensor's memory is unmapped
    assert (library.taken, library.reserved) == (0, {})


def test_a_region_that_is_deleted_while_released_gives_its_addresses_back(no_gpu):
    library = FakeLibrary()
    held = region(library)
    held.release()
    del held
    gc.collect()
    assert library.calls[-1] == "free"
    assert library.reserved == {}


@pytest.mark.parametrize(
    ("step", "name"),
    [("create", "cuMemCreate"), ("map", "cuMemMap"), ("access", "cuMemSetAccess")],
)
def test_a_failed_call_is_named_and_leaves_no_memory_taken(no_gpu, step, name):
    library = FakeLibrary(fail={})
    held = region(library)
    held.release()
    library.fail[step] = [1]
    with pytest.raises(CudaDriverError, match=rf"{name} on cuda:3 failed with CUDA_ERROR_INVALID_VALUE \(1\)"):
        held.resume()
    assert (library.taken, library.mapped) == (0, {})
    held.resume()
    assert len(library.accessible) == 1
    library.fail["unmap"] = [719]
    with pytest.raises(CudaDriverError, match=r"cuMemUnmap on cuda:3 failed with an unknown error \(719\)"):
        held.release()
    held.release()
    assert library.taken == 0


def test_memory_that_others_took_is_asked_for_twice_and_then_explained(no_gpu):
    library = FakeLibrary(fail={"create": [0, 2]})
    held = region(library)
    held.release()
    held.resume()  # PyTorch's cache was in the way
    assert no_gpu == ["empty_cache"]
    held.release()
    library.capacity = MIB
    with pytest.raises(torch.OutOfMemoryError, match=r"0\.01 GiB are needed on cuda:3 for the KV cache, .*; lower g"):
        held.resume()
    assert library.mapped == {}
    library.capacity = 64 * MIB
    held.resume()
    assert len(library.mapped) == 1
    assert issubclass(CudaOutOfMemory, RuntimeError)


def test_the_state_follows_what_happened(no_gpu, monkeypatch):
    """A release or resume that failed may be tried again."""
    library = FakeLibrary()
    monkeypatch.setattr(lent_memory, "_region", lambda num_bytes, device, tenant: region(library, num_bytes, tenant))
    memory = LentMemory(4, torch.device("cuda", 3), WEIGHTS)
    memory.release()
    library.fail["create"] = [2, 2]
    with pytest.raises(torch.OutOfMemoryError, match=r"for the rollout's weights, .*; set param_offload=true"):
        memory.resume()
    assert memory.released
    memory.resume()
    assert not memory.released
    assert no_gpu == ["synchronize", "empty_cache"]


def test_a_release_waits_for_the_gpu_that_was_current_when_the_memory_was_taken(no_gpu, monkeypatch):
    waited = []
    monkeypatch.setattr(lent_memory, "_region", lambda num_bytes, device, tenant: region(FakeLibrary()))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    memory = LentMemory(4, torch.device("cuda"), WEIGHTS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    memory.release()
    assert waited == [torch.device("cuda", 3)]


def test_a_gpu_without_virtual_memory_keeps_its_cache(monkeypatch):
    monkeypatch.setattr(lent_memory, "_region", lambda num_bytes, device, tenant: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GRID V100D")
    memory = LentMemory(4, torch.device("cpu"), KV_CACHE)
    with pytest.raises(RuntimeError, match="cannot be given back: GRID V100D has no virtual memory management"):
        memory.release()
    memory.resume()
    assert (memory.released, memory.bytes.tolist()) == (False, [0, 0, 0, 0])


@pytest.mark.gpu
def test_graphs_captured_before_a_release_give_the_same_bits_after_it():
    """The memory is free meanwhile, others may use it, and the graphs find theirs where they left it."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = tiny_model(0, torch.bfloat16, max_position_embeddings=8192, **sizes).cuda()
    torch.cuda.empty_cache()
    without = torch.cuda.mem_get_info()[0]
    engine = Engine(model=model, max_model_len=6000, max_num_seqs=64, kv_cache_bytes=1 << 30)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (3, 17, 90, 2030)]
    first = sampled_by_graphs(engine, prompts)
    replays = dict(engine._runner.graphs._replays)
    held = engine.num_pages * kv_page_bytes(model, engine.config.page_size)
    for fill in (0xFF, 0x7F):
        addresses = [tensor.data_ptr() for pair in engine._runner.kv_caches for tensor in pair]
        before = torch.cuda.mem_get_info()[0]
        engine.release_kv_cache()
        freed = torch.cuda.mem_get_info()[0] - before
        assert freed >= held
        others = torch.full((freed - (64 << 20),), fill, dtype=torch.uint8, device="cuda")
        blocker = torch.empty(torch.cuda.mem_get_info()[0] - (256 << 20), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="GiB are free; lower gpu_memory_utilization"):
            engine.resume_kv_cache()
        del others, blocker
        engine.resume_kv_cache()
        assert [tensor.data_ptr() for pair in engine._runner.kv_caches for tensor in pair] == addresses
        assert not any(tensor.any() for pair in engine._runner.kv_caches for tensor in pair)
        assert sampled_by_graphs(engine, prompts) == first
        assert dict(engine._runner.graphs._replays) == replays
    del engine, replays
    gc.collect()
    torch.cuda.empty_cache()
    assert without - torch.cuda.mem_get_info()[0] < held  # the deleted engine's cache is free again
