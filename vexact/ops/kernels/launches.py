"""Launching a kernel again without binding its arguments again.

Triton names, specialises and looks up all arguments in every launch, and encodes every tensor descriptor: the host
takes longer for that than most kernels run. Here the first launch of a key goes that way; what Triton then hands to the
C function below it is recorded, and handed over again with the addresses of other tensors.

A descriptor on the device says where a tensor is, how large and how far apart its rows are. It is a value: equal
numbers give equal descriptors, whoever owns the memory by now, so they are kept by these numbers and never out of date.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Hashable, Sequence
from types import CellType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; Triton compiles another kernel for an address that is no multiple
_MOST = 4096  # entries of a table before it starts again
_BASE_ARGS = 5  # three sizes of the grid, the stream, the kernel

_encoded: dict[Hashable, dict[int, Any]] = {}
_all: WeakSet[Launches] = WeakSet()
_logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """One launch as Triton takes it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # tensors, descriptors and numbers, in the order of the kernel's parameters
    constants: dict[str, Any]  # constexpr parameters and options


class Launches:
    """The launches of an operator, each kind recorded once and then repeated."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recorded | None] = {}
        self._kinds: dict[Hashable, Hashable] = {}
        _all.add(self)

    def forget(self) -> None:
        self._recorded.clear()
        self._kinds.clear()

    def __call__(self, key: Hashable, tensors: Sequence[Tensor], describe: Callable[[], Call | None]) -> bool:
        """Launches ``describe()``; False, and nothing, where that is None: the kernel does not take these tensors.

        Args:
            key: determines everything about the call except where ``tensors`` lie. In the interpreter every call is
                held against the first one of its key.
            tensors: what the arguments of the call point to, each once.
            describe: None for a key always, or because an address is no multiple of ALIGNMENT.
        """
        if self._recorded:
            active = driver.active
            device = active.get_current_device()
            recorded = self._recorded.get((device, key))
            if recorded is not None and not _observed():
                addresses = [tensor.data_ptr() for tensor in tensors if tensor.get_device() == device]
                here = len(addresses) == len(tensors)
                if here and recorded.launch(active.get_current_stream(device), addresses):
                    return True
        call = describe()
        if call is None:
            return False
        self._bind(key, tensors, call)
        return True

    def _bind(self, key: Hashable, tensors: Sequence[Tensor], call: Call) -> None:
        compiled = call.kernel[call.grid](*call.args, **call.constants)
        addresses = [tensor.data_ptr() for tensor in tensors]
        if any(address % ALIGNMENT for address in addresses):
            return
        if not isinstance(call.kernel, JITFunction):
            self._check(key, call)
            return
        place = driver.active.get_current_device(), key
        ambiguous = len(set(addresses)) < len(addresses)
        if place in self._recorded or ambiguous or _observed() or call.kernel.pre_run_hooks:
            return
        if len(self._recorded) >= _MOST:
            self._recorded.clear()
        try:
            self._recorded[place] = _record(compiled, call, tensors)
        except Exception as error:  # a release of Triton with other insides: its own way to launch still works
            _logger.debug("launches of %s are not repeated: %r", call.kernel, error)
            self._recorded[place] = None

    def _check(self, key: Hashable, call: Call) -> None:
        kind = call.kernel, call.grid, tuple(map(_kind, call.args)), tuple(call.constants.items())
        assert self._kinds.setdefault(key, kind) == kind, f"{key} stands for {self._kinds[key]} and for {kind}"


def forget() -> None:
    """The next launch of every kind goes through Triton again. For tests that change what decides a launch."""
    _encoded.clear()
    for launches in _all:
        launches.forget()


class _Slot:
    """Where the C function takes the address of a tensor, or a descriptor of it."""

    def __init__(self, place: int, tensor: int, encode: Callable[[int], Any] | None, known: dict[int, Any]) -> None:
        self.place = place  # among the arguments of the C function
        self.tensor = tensor  # which of the tensors
        self.encode = encode  # None: the address itself
        self.known = known

    def descriptor(self, address: int) -> Any:
        if len(self.known) >= _MOST:
            self.known.clear()
        assert self.encode is not None
        found = self.known[address] = self.encode(address)
        return found


class _Recorded:
    """What the C function was handed, but for the stream and for what depends on addresses."""

    def __init__(
        self, compiled: Any, function: Callable[..., None], final: tuple[Any, ...], slots: list[_Slot]
    ) -> None:
        self._compiled = compiled  # unloads its code when nobody holds it
        self._function = function
        self._grid, self._kernel = final[:3], final[4]
        self._nested = isinstance(final[-1], (tuple, list))  # since Triton 3.7 the kernel's own arguments are one
        self._head = final[_BASE_ARGS:-1] if self._nested else ()
        self._args = list(final[-1] if self._nested else final[_BASE_ARGS:])
        self._pointers = [(slot.place, slot.tensor) for slot in slots if slot.encode is None]
        self._descriptors = [(slot.place, slot.tensor, slot.known, slot) for slot in slots if slot.encode]
        for slot in slots:
            self._args[slot.place] = None

    def launch(self, stream: int, addresses: list[int]) -> bool:
        """Whether it was launched: not where an address is unaligned."""
        bits = 0
        for address in addresses:
            bits |= address
        if bits % ALIGNMENT:
            return False
        args = self._args.copy()
        for place, tensor in self._pointers:
            args[place] = addresses[tensor]
        for place, tensor, known, slot in self._descriptors:
            address = addresses[tensor]
            args[place] = known.get(address) or slot.descriptor(address)
        if self._nested:
            self._function(*self._grid, stream, self._kernel, *self._head, args)
        else:
            self._function(*self._grid, stream, self._kernel, *args)
        return True


def _observed() -> bool:
    """Whether a profiler wants to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _is_descriptor(arg: Any) -> bool:
    """Whether it is a tensor descriptor: Triton and Gluon have a class each."""
    return isinstance(getattr(arg, "base", None), Tensor) and hasattr(arg, "block_shape")


def _form(descriptor: Any) -> tuple[Hashable, ...]:
    """All that a descriptor says but for the tensor."""
    fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
    return tuple(tuple(value) if isinstance(value, (list, tuple)) else value for value in fields.values())


def _kind(arg: Any) -> Hashable:
    if isinstance(arg, Tensor):
        return str(arg.dtype)
    return (str(arg.base.dtype), _form(arg)) if _is_descriptor(arg) else arg


def _record(compiled: Any, call: Call, tensors: Sequence[Tensor]) -> _Recorded | None:
    """What Triton would hand to its C function for this call; None where that is not understood, so that Triton goes on
    launching it."""
    launcher = compiled.run
    if getattr(compiled.metadata, "global_scratch_size", 1) or getattr(compiled.metadata, "profile_scratch_size", 1):
        return None  # memory of a launch's own
    found = _function_and_recorder(launcher)
    if found is None:
        return None
    function, recorder, seen = found
    names = call.kernel.arg_names[len(call.args) :]
    grid = (*call.grid, 1, 1)[:3]
    recorder(
        *(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None),
        *(*call.args, *(call.constants[name] for name in names)),
    )
    if len(seen) != 1 or seen[0][:_BASE_ARGS] != (*grid, 0, compiled.function):
        return None
    slots = _slots(launcher, compiled, call, seen[0], tensors)
    return None if slots is None else _Recorded(compiled, function, seen[0], slots)


def _function_and_recorder(launcher: Any) -> tuple[Any, Any, list[tuple[Any, ...]]] | None:
    """The C function under a launcher of Triton, a twin of the launcher that only notes what it would hand to it, and
    the notes."""
    seen: list[tuple[Any, ...]] = []

    def note(*final: Any) -> None:
        seen.append(final)

    outer = getattr(launcher, "launch", None)
    if outer is None:
        return None
    twin = copy.copy(launcher)
    if not isinstance(outer, FunctionType):
        twin.launch = note
        return outer, twin, seen
    cells = dict(zip(outer.__code__.co_freevars, outer.__closure__ or (), strict=True))
    if "launcher" not in cells:
        return None
    function = cells["launcher"].cell_contents
    cells["launcher"] = CellType(note)
    twin.launch = FunctionType(outer.__code__, outer.__globals__, outer.__name__, None, tuple(cells.values()))
    return function, twin, seen


def _slots(
    launcher: Any, compiled: Any, call: Call, final: tuple[Any, ...], tensors: Sequence[Tensor]
) -> list[_Slot] | None:
    """Where addresses and descriptors stand in ``final``; None if they are not those of ``call.args``."""
    sources = [arg for arg in call.args if isinstance(arg, Tensor) or _is_descriptor(arg)]
    args = final[-1] if isinstance(final[-1], (tuple, list)) else final[_BASE_ARGS:]
    module = sys.modules[type(launcher).__module__]
    kinds = tuple(filter(None, (Tensor, getattr(module, "PyCUtensorMap", None))))
    places = [place for place, arg in enumerate(args) if isinstance(arg, kinds)]
    if len(places) != len(sources):
        return None
    metadata = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    owners = {tensor.data_ptr(): index for index, tensor in enumerate(tensors)}
    slots = []
    for place, source in zip(places, sources, strict=True):
        descriptor = None if isinstance(source, Tensor) else source
        owner = owners.get((source if descriptor is None else descriptor.base).data_ptr())
        meta = None if descriptor is None else next(metadata, None)
        if owner is None or isinstance(args[place], Tensor) != (meta is None):
            return None
        if descriptor is None and args[place] is not source:
            return None
        if descriptor is None or meta is None:
            slots.append(_Slot(place, owner, None, {}))
        else:
            encode = _encoder(descriptor, meta, module.make_tensordesc_arg)
            key = compiled.hash, len(slots), _form(descriptor)
            if len(_encoded) >= _MOST:
                _encoded.clear()
            slots.append(_Slot(place, owner, encode, _encoded.setdefault(key, {})))
            slots[-1].descriptor(descriptor.base.data_ptr())  # what cannot be encoded is noticed here
    return slots


class _Address:
    """A tensor of which nothing is known but where it is."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _encoder(descriptor: Any, meta: Any, make: Callable[..., list[Any]]) -> Callable[[int], Any]:
    """What encodes such a descriptor for any address."""
    form = copy.copy(descriptor)
    form.base = None  # no memory is kept alive
    more = (None,) * (make.__code__.co_argcount - 2)

    def encode(address: int) -> Any:
        moved = copy.copy(form)
        moved.base = _Address(address)
        return make(moved, meta, *more)[0]

    return encode
