"""Runs warp-specialised Gluon kernels on the CPU, to test what they compute and how their warps hand tiles over.

A partition is a thread, a barrier counts arrivals and bytes as an mbarrier does. What the hardware does on its own time
happens as late, or as oddly, as it may: a tile that travels by the tensor memory accelerator is NaN until a random time
later, and a warp-group product reads its operands only when it is waited for. So a barrier that is forgotten gives NaN
or other values, one that is never completed a time-out, and a result that is used before the wait an error. Layouts are
ignored, and so are bits: sums are those of torch.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TIMEOUT_S = 300.0  # of a wait that nothing ends: it says nothing of how fast the machine is
_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64}


class Registers(torch.Tensor):
    """A tensor of a partition."""

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.unbind(-1)


def registers(value: Any) -> Registers:
    return torch.as_tensor(value).as_subclass(Registers)


class Pointer:
    """Elements of a tensor, by offsets into its storage."""

    def __init__(self, flat: Tensor, offsets: Any = 0) -> None:
        self.flat, self.offsets = flat, offsets
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.flat, self.offsets + offsets)


class Barrier:
    def __init__(self, failures: Sequence[BaseException] = ()) -> None:
        """``failures``: of the partitions; after one nobody waits."""
        self.count = self.pending = self.bytes = self.phase = 0
        self.failures = failures
        self.changed = threading.Condition()

    def update(self, arrivals: int, num_bytes: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += num_bytes
            if self.pending < 0:
                raise RuntimeError("more arrivals than the barrier expects")
            if self.pending == 0 and self.bytes == 0:
                self.pending = self.count
                self.phase ^= 1
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        with self.changed:
            while not self.changed.wait_for(lambda: self.phase != parity, 0.1):
                if self.failures or time.monotonic() > deadline:
                    raise TimeoutError("a barrier was never completed")


class Barriers:
    def __init__(self, count: int, failures: Sequence[BaseException]) -> None:
        self.items = [Barrier(failures) for _ in range(count)]

    def index(self, index: Any) -> Barrier:
        return self.items[int(index)]


class Memory:
    """A view of shared memory. `root` is the allocation, which knows who has written to it without a fence."""

    def __init__(self, view: Tensor, root: Memory | None = None) -> None:
        self.view, self.root, self.dtype = view, root or self, view.dtype
        self.unfenced: set[tuple[int, int, int]] = set()  # thread and range of addresses

    def _of(self, view: Tensor) -> Memory:
        return Memory(view, self.root)

    def index(self, index: Any) -> Memory:
        return self._of(self.view[int(index)])

    def slice(self, start: int, length: int) -> Memory:
        return self._of(self.view[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Memory:
        return self._of(self.view.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], _layout: Any) -> Memory:
        size = torch.Size(shape).numel()
        return self._of(self.view.reshape(-1).view(dtype)[:size].view(shape))

    def load(self, _layout: Any) -> Registers:
        return registers(self.view.clone())

    def store(self, value: Tensor) -> None:
        self.view.copy_(torch.as_tensor(value))
        self.root.unfenced.add((threading.get_ident(), *self._addresses()))

    def _addresses(self) -> tuple[int, int]:
        return self.view.data_ptr(), self.view.data_ptr() + self.view.numel() * self.view.itemsize

    def read_by_hardware(self) -> Tensor:
        """The view, for the tensor cores to read or a copy to overwrite."""
        first, end = self._addresses()
        if any(first < other_end and other < end for _, other, other_end in tuple(self.root.unfenced)):
            raise RuntimeError("shared memory is used by the hardware before the fence that follows a store")
        return self.view


class Product:
    """A warp-group product that has been issued."""

    def __init__(self, compute: Callable[[], Tensor], held: Any) -> None:
        self.compute, self.value = compute, None
        self.held = held  # its left operand, if that is in registers


class Machine:
    """One program: its shared memory, its asynchronous copies and its partitions."""

    def __init__(self, program: int, programs: int, seed: int, hasty: bool) -> None:
        self.program, self.programs, self.hasty = program, programs, hasty
        self.random = random.Random(seed)
        self.memories: list[Memory] = []
        self.local = threading.local()
        self.failures: list[BaseException] = []

    def allocate(self, dtype: torch.dtype, shape: list[int], _layout: Any) -> Memory | Barriers:
        if dtype == torch.int64:
            return Barriers(shape[0], self.failures)
        fill = float("nan") if dtype.is_floating_point else -7
        self.memories.append(Memory(torch.full(shape, fill, dtype=dtype)))
        return self.memories[-1]

    def fence(self) -> None:
        for memory in self.memories:
            memory.unfenced -= {mark for mark in tuple(memory.unfenced) if mark[0] == threading.get_ident()}

    def copy(
        self, desc: Descriptor, coordinates: list[Any], barrier: Barrier, target: Memory, pred: Any = True
    ) -> None:
        if not pred:
            return
        if tuple(target.view.shape) != tuple(desc.block_shape):
            raise ValueError(f"a box of {tuple(desc.block_shape)} is copied to a place of {tuple(target.view.shape)}")
        row, column = (int(coordinate) for coordinate in coordinates)
        if row < 0 or column < 0:
            raise IndexError(f"a box at row {row}, column {column}: there is no such page")
        target.read_by_hardware().fill_(float("nan"))
        if self.hasty:
            barrier.update(0, -desc.block_type.nbytes)
            return

        def arrive() -> None:
            time.sleep((0.3 + self.random.random()) * 1e-3)
            target.view.copy_(desc.box(row, column))
            barrier.update(0, -desc.block_type.nbytes)

        threading.Thread(target=arrive, daemon=True).start()

    def multiply(self, a: Any, b: Memory, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        queue = getattr(self.local, "queue", [])
        if use_acc and isinstance(acc, Product) and acc not in queue[-1:]:
            raise RuntimeError("a sum that is still being computed is used by another product than the next one")

        def compute() -> Tensor:
            left = a.read_by_hardware() if isinstance(a, Memory) else a
            product = left.float() @ b.read_by_hardware().float()
            before = acc.value if isinstance(acc, Product) else acc
            return registers(before + product if use_acc else product)

        self.local.queue = [*queue, Product(compute, None if isinstance(a, Memory) else a)]
        return self.local.queue[-1]

    def wait_products(self, outstanding: int, deps: list[Any]) -> Any:
        queue = getattr(self.local, "queue", [])
        while len(queue) > outstanding:
            first = queue.pop(0)
            if first.held is not None and not any(dep is first.held for dep in deps):
                raise RuntimeError("registers that a product reads are let go before it has been waited for")
            first.value = first.compute()
        values = [dep.value if isinstance(dep, Product) else dep for dep in deps]
        if any(value is None for value in values):
            raise RuntimeError("a product is used that has not been waited for")
        return values[0] if len(values) == 1 else tuple(values)

    def specialise(self, partitions: list[tuple[Callable, tuple]], *_registers: Any) -> None:
        def run(function: Callable, arguments: tuple) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.failures.append(error)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


class Descriptor:
    def __init__(self, source: TensorDescriptor) -> None:
        base = source.base
        self.rows = torch.as_strided(base, source.shape, source.strides, base.storage_offset())
        self.block_shape, self.layout, self.dtype = source.block_shape, source.layout, base.dtype
        nbytes = torch.Size(source.block_shape).numel() * base.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes)

    def box(self, row: int, column: int) -> Tensor:
        """A box of the rows; what lies behind them reads as 0."""
        height, width = self.block_shape
        box = torch.zeros(height, width, dtype=self.dtype)
        part = self.rows[row : row + height, column : column + width]
        box[: part.shape[0], : part.shape[1]] = part
        return box


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Registers:
    offsets = torch.as_tensor(pointer.offsets)
    if mask is None:
        return registers(pointer.flat[offsets])
    mask = torch.as_tensor(mask).expand(offsets.shape)
    return registers(torch.where(mask, pointer.flat[torch.where(mask, offsets, 0)], other))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offsets = torch.as_tensor(pointer.offsets)
    value = torch.as_tensor(value).as_subclass(torch.Tensor).expand(offsets.shape).to(pointer.flat.dtype)
    keep = torch.ones(offsets.shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(offsets.shape)
    keep = keep.as_subclass(torch.Tensor)
    pointer.flat[offsets.as_subclass(torch.Tensor)[keep]] = value[keep]


def _add(pointer: Pointer, value: int) -> Tensor:
    before = pointer.flat[0].clone()
    pointer.flat[0] += value
    return registers(before)


def _moved(asm: str, values: list[Any]) -> Any:
    if asm != "mov.b32 $0, $1;":
        raise NotImplementedError(asm)
    return values[0]


def _language(machine: Machine) -> dict[str, Any]:
    """What the names of the languages stand for."""

    def both(function: Callable) -> Callable:
        return lambda *values: registers(function(*(torch.as_tensor(value) for value in values)))

    def where(condition: Any, a: Any, b: Any) -> Registers:
        return registers(torch.where(torch.as_tensor(condition), a, b))

    def full(shape: list[int], value: float, dtype: torch.dtype, _layout: Any = None) -> Registers:
        return registers(torch.full(shape, value, dtype=dtype))

    math = {
        "exp2": both(torch.exp2), "log2": both(torch.log2), "div_rn": both(torch.div),
        "fma": both(lambda x, y, z: x * y + z),
    }  # fmt: skip
    names = {
        "where": where, "maximum": both(torch.maximum), "minimum": both(torch.minimum), "full": full,
        "max": lambda x, axis: x.amax(axis), "sum": lambda x, axis: x.sum(axis),
        "zeros": lambda shape, dtype, layout=None: full(shape, 0, dtype),
        "arange": lambda start, end, layout=None: registers(torch.arange(start, end)),
        "cast": lambda value, dtype: registers(value).to(dtype),
        "load": _load, "store": _store, "atomic_add": _add, "cdiv": lambda a, b: -(-a // b),
        "inline_asm_elementwise": lambda asm, constraints, values, **named: _moved(asm, values),
        "convert_layout": lambda value, layout, assert_trivial=False: value,
        "program_id": lambda axis: registers(machine.program), "num_programs": lambda axis: machine.programs,
        "static_range": range, "allocate_shared_memory": machine.allocate, "warp_specialize": machine.specialise,
        **math, **_NAMES, "math": SimpleNamespace(**math),
    }  # fmt: skip
    layouts = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout")
    names |= dict.fromkeys((*layouts, "SwizzledSharedLayout"), lambda *_values, **_named: None)
    language = SimpleNamespace(**names)
    barrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        wait=lambda barrier, phase: barrier.wait(int(phase)),
        arrive=lambda barrier, count=1: barrier.update(count, 0),
        expect=lambda barrier, num_bytes: barrier.update(1, num_bytes),
        init=lambda barrier, count: barrier.__dict__.update(count=count, pending=count),
    )
    return {
        "gl": language, "tl": language, "mbarrier": barrier,
        "tma": SimpleNamespace(async_copy_global_to_shared=machine.copy),
        "fence_async_shared": machine.fence,
        "warpgroup_mma": machine.multiply, "warpgroup_mma_wait": machine.wait_products,
    }  # fmt: skip


def _translate(machine: Machine) -> Callable[[Any], Callable]:
    language = _language(machine)

    translated: dict[int, Callable] = {}

    def translate(function: Any) -> Callable:
        if id(function) in translated:
            return translated[id(function)]
        source = function.fn
        names = {name: source.__globals__[name] for name in source.__code__.co_names if name in source.__globals__}
        for name, value in names.items():
            if name in language:
                names[name] = language[name]
            elif callable(getattr(value, "fn", None)):
                names[name] = translate(value)
            elif hasattr(value, "value"):
                names[name] = value.value
        scope = {"__builtins__": __builtins__, **names}
        return translated.setdefault(id(function), FunctionType(source.__code__, scope, None, source.__defaults__))

    return translate


class EmulatedKernel:
    """Stands for a kernel: `kernel[(programs,)](...)` on CPU tensors. A hasty one goes on before its copies have
    come, as if every wait for them had been forgotten and they took longer than all the rest."""

    def __init__(self, kernel: Any, *, seed: int = 0, most_programs: int = 2, hasty: bool = False) -> None:
        self.kernel, self.seed, self.most_programs, self.hasty = kernel, seed, most_programs, hasty

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int = 4, **constants: Any) -> None:
            programs = min(grid[0], self.most_programs)
            values = [self._argument(value) for value in arguments]
            for program in range(programs):
                machine = Machine(program, programs, self.seed + program, self.hasty)
                _translate(machine)(self.kernel)(*values, **constants)

        return launch

    @staticmethod
    def _argument(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return Descriptor(value)
        return Pointer(value.view(-1)) if isinstance(value, Tensor) else value
