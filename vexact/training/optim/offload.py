"""What waits in host memory while the device does something else: master weights and optimizer moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vexact.training.optim.host_memory import host_memory
from vexact.training.parallel.ranks import local

_PIECE, _SLOTS = 1 << 23, 4
"""Elements of each moment that travel together, and how many such loads are on the device: 256 MiB of both moments."""

Flat = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights, gradients, first and second moments, (n,) each; the moments on the host."""


class Parked:
    """Tensors that are on their device inside ``resident()`` only, and in pinned host memory otherwise.

    The tensors stay the objects they are, views of them too: their storage is emptied and filled again. Outside of
    ``resident()`` they must not be read.
    """

    def __init__(self, tensors: Iterable[Tensor], enabled: bool) -> None:
        """Parks the tensors at once, when enabled; otherwise does nothing, ever."""
        self._tensors, self._enabled, self._depth = list(tensors), enabled, 0
        self._waiting: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._hosts: list[Tensor] = []  # kept for the next time
        self._host_rows: list[Tensor] = []
        self._park()

    @property
    def is_absent(self) -> bool:
        return self._enabled and self._depth == 0

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Nests."""
        if self._depth == 0:
            self._fetch()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._park()

    def rows(self) -> list[Tensor]:
        """This rank's rows of every tensor, where they are now."""
        return self._host_rows if self._waiting else [local(tensor) for tensor in self._tensors]

    def _park(self) -> None:
        if not self._enabled:
            return
        rows = [local(tensor) for tensor in self._tensors]
        storages = {s.data_ptr(): s for s in (part.untyped_storage() for part in rows) if s.size()}
        if [storage.size() for storage in storages.values()] != [len(host) for host in self._hosts]:
            pinned = any(storage.device.type == "cuda" for storage in storages.values())
            if pinned:
                torch.cuda.synchronize()  # the last values may be on their way still, from memory that goes now
            self._hosts = host_memory([storage.size() for storage in storages.values()], pinned)
        self._waiting = list(zip(storages.values(), self._hosts, strict=True))
        for storage, host in self._waiting:
            host.copy_(_bytes(storage), non_blocking=True)
        by_address = {address: host for address, (_, host) in zip(storages, self._waiting, strict=True)}
        self._host_rows = [_view(part, by_address.get(part.untyped_storage().data_ptr())) for part in rows]
        on_gpu = any(part.is_cuda for part in rows)
        if on_gpu:
            torch.cuda.synchronize(rows[0].device)
        for storage in storages.values():
            storage.resize_(0)
        if on_gpu:
            torch.cuda.empty_cache()  # for the key-value cache, which does not ask torch for memory

    def _fetch(self) -> None:
        try:
            for storage, host in self._waiting:
                storage.resize_(host.numel())
                _bytes(storage).copy_(host, non_blocking=True)
        except BaseException:  # no memory: what is on the host stays the truth
            for storage, _ in self._waiting:
                storage.resize_(0)
            raise


def park(model: nn.Module, enabled: bool) -> Parked:
    """Parks a model's parameters, when ``enabled``; its forward then raises RuntimeError outside of ``resident()``."""
    parked = Parked(model.parameters(), enabled)
    if enabled:

        def refuse_absent(*_: object) -> None:
            if parked.is_absent:
                raise RuntimeError("the model's weights are in host memory (param_offload); compute inside resident()")

        model.register_forward_pre_hook(refuse_absent, prepend=True)
    return parked


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def _view(rows: Tensor, host: Tensor | None) -> Tensor:
    """The bytes in ``host`` of a tensor's storage, seen as that tensor."""
    if host is None:
        return torch.empty_like(rows, device="cpu")
    numbers = host.view(rows.dtype)
    return numbers.as_strided(rows.size(), rows.stride(), numbers.storage_offset() + rows.storage_offset())


def stream(group: Sequence[Flat], step: Callable[..., None]) -> list[Tensor]:
    """``step(weights, gradients, exp_avgs, exp_avg_sqs)``, lists of tensors on the device, for load after load.

    On a GPU some loads arrive and some leave while one is computed. Returns the smallest and largest second moment of
    every load, (2,) on the device; when it returns, the moments on the host are the new ones.
    """
    device = group[0][0].device
    if device.type == "cuda":
        return _stream_cuda(group, step, device)
    seen = []
    for load in _loads(group):
        step(*load)
        seen += [torch.stack(second.aminmax()) for second in load[3]]
    return seen


def _loads(group: Sequence[Flat]) -> Iterator[tuple[list[Tensor], ...]]:
    """The tensors in order, cut so that all loads but the last are of one size.

    Otherwise one way of the bus would wait for the other: one load leaves while another one arrives.
    """
    load: list[Flat] = []
    room = _PIECE
    for flat in group:
        start, end = 0, len(flat[0])
        while start < end:
            part = slice(start, min(end, start + room))
            load.append((flat[0][part], flat[1][part], flat[2][part], flat[3][part]))
            room -= part.stop - start
            start = part.stop
            if not room:
                yield tuple(map(list, zip(*load, strict=True)))
                load, room = [], _PIECE
    if load:
        yield tuple(map(list, zip(*load, strict=True)))


def _stream_cuda(group: Sequence[Flat], step: Callable[..., None], device: torch.device) -> list[Tensor]:
    current, arriving, leaving = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)
    width = min(_PIECE, sum(len(flat[0]) for flat in group))
    slots = [torch.empty(2, width, dtype=torch.float32, device=device) for _ in range(_SLOTS)]
    free: list[torch.cuda.Event | None] = [None] * _SLOTS
    arriving.wait_stream(current)  # the slots may be memory that is still in use there
    seen = []
    for number, load in enumerate(_loads(group)):
        slot = number % _SLOTS
        weights, gradients, *host = load
        sizes = [len(weight) for weight in weights]
        filled = slots[slot][:, : sum(sizes)]
        staged = [list(moment.split(sizes)) for moment in filled]
        with torch.cuda.stream(arriving):
            if (event := free[slot]) is not None:
                arriving.wait_event(event)
            _copy(host, staged)
        current.wait_event(arriving.record_event())
        step(weights, gradients, *staged)
        seen.append(torch.stack(filled[1].aminmax()))
        with torch.cuda.stream(leaving):
            leaving.wait_event(current.record_event())
            _copy(staged, host)
        free[slot] = leaving.record_event()
    leaving.synchronize()
    return seen


def _copy(sources: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]) -> None:
    for moment_from, moment_to in zip(sources, targets, strict=True):
        for source, target in zip(moment_from, moment_to, strict=True):
            target.copy_(source, non_blocking=True)
