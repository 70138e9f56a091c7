"""An engine that a thread of its own drives, for any number of callers on event loops."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch

from vexact.rollout.engine import Engine
from vexact.rollout.sampling.sampler import NonFiniteLogprobError, StepOutput
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.rollout.scheduling.block_manager import BlockError, KVIntegrityError
from vexact.rollout.stream import (
    Ask,
    EngineClosedError,
    EngineFailedError,
    News,
    Order,
    QueueFullError,
    Stream,
    deliver,
)
from vexact.types import Sample

T = TypeVar("T")

# After one of these neither the pages nor the device can be trusted. Running out of memory is not among them.
_FATAL = (BlockError, KVIntegrityError, torch.AcceleratorError)


class AsyncEngine:
    """Everything happens on the thread, between two steps, in the order in which it was asked for.

    Nobody else may call ``engine``. Which requests share a batch depends on when they come; no bit of a sample does.

    Example::

        engine = AsyncEngine(Engine("path/to/model"))
        samples = await engine.generate([1, 2, 3], SamplingParams(max_tokens=32), "mine")
        async with engine.stream([1, 2, 3], SamplingParams(max_tokens=32)) as deltas:
            async for delta in deltas:
                print(delta.token_ids, delta.logprobs)
        async with engine.paused():
            await engine.run(lambda engine: engine.update_weights(named, version=1))
    """

    def __init__(self, engine: Engine, max_queue: int | None = None) -> None:
        """``max_queue``: most samples that may wait for one of the engine's ``max_num_seqs`` slots; None: any number.

        Raises ValueError for a negative ``max_queue``.
        """
        if max_queue is not None and max_queue < 0:
            raise ValueError(f"max_queue={max_queue} must be at least 0, or None for a queue without an end")
        self._engine = engine
        self._max_unfinished = None if max_queue is None else engine.config.max_num_seqs + max_queue
        self._wake = threading.Condition()  # guards what follows, up to the thread's own
        self._calls: list[tuple[Callable[[], None], Callable[[BaseException], None]]] = []
        self._num_reserved = 0
        self._refusal: Exception | None = None  # why no request is taken any more
        self._failure: EngineFailedError | None = None
        self._closed = False
        self._parts: dict[str, tuple[Order, int]] = {}  # sample id -> its request, and which sample of it
        self._unstarted: set[str] = set()  # samples without a token
        self._live: set[str] = set()  # samples whose tokens are shown as they come
        self._held: list[Order] = []  # asked for while paused
        self._pause: object | None = None
        self._waiters: list[tuple[Callable[[], bool], Future[None]]] = []
        self._outbox: dict[asyncio.AbstractEventLoop, list[News]] = {}
        engine.observe_tokens(self._see)
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Samples that were asked for and have not ended; those that wait are among them."""
        return self._num_reserved

    @property
    def is_full(self) -> bool:
        """Whether a request would be refused for want of a place in the queue."""
        return self._max_unfinished is not None and self._num_reserved >= self._max_unfinished

    @property
    def refusal(self) -> Exception | None:
        """What a new request would raise because the engine drains, was closed or has failed."""
        return self._refusal

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        draw_id: str | None = None,
    ) -> list[Sample]:
        """The n samples of one prompt. A caller that is cancelled takes its request along.

        Raises what ``Engine.add_request`` raises; NonFiniteLogprobError for a sample of its own; what ended a step in
        which it had part; EngineClosedError, EngineFailedError and QueueFullError.
        """
        found: dict[int, Sample] = {}
        async with self.stream(prompt_token_ids, sampling_params, request_id, draw_id, live=False) as deltas:
            async for delta in deltas:
                if delta.sample is not None:
                    found[delta.index] = delta.sample
        return [found[index] for index in sorted(found)]

    @asynccontextmanager
    async def stream(
        self,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        draw_id: str | None = None,
        *,
        live: bool = True,
    ) -> AsyncIterator[Stream]:
        """The tokens of the n samples as they are sampled. Who leaves before the end takes the request along.

        Entering raises what keeps the request from starting, the stream what ends it: see ``generate``.
        """
        ask = Ask(prompt_token_ids, sampling_params, request_id, draw_id)
        async with self.stream_all([ask], live=live) as deltas:
            yield deltas

    @asynccontextmanager
    async def stream_all(self, asks: Sequence[Ask], *, live: bool = True) -> AsyncIterator[Stream]:
        """``stream`` for several requests, all of them or none: one that cannot start keeps the others from it."""
        stream = Stream(asyncio.get_running_loop(), sum(ask.num_samples for ask in asks), live=live)
        firsts = accumulate((ask.num_samples for ask in asks), initial=0)
        orders = [Order(ask, stream, first) for ask, first in zip(asks, firsts)]
        self._reserve(orders)
        try:
            for order in orders:
                await asyncio.wrap_future(order.added)
            yield stream
        finally:
            for order in orders:
                if order.num_reserved:  # it has neither ended nor failed
                    self._post(partial(self._withdraw, order), lambda _: None, quietly=True)

    async def abort(self, request_ids: Collection[str] | None = None) -> list[str]:
        """Ends these requests, or all: their callers get what was sampled so far. Returns the ids of the samples ended.

        An id may be that of a request or of one of its samples. All does not mean those that a pause holds back.
        """

        def end(engine: Engine) -> list[str]:
            names = None
            if request_ids is not None:
                self._start_held(request_ids)
                names = {name for name in self._parts if not {name, name.rpartition("/")[0]}.isdisjoint(request_ids)}
            samples = engine.abort(names)
            self._resolve(samples)
            return [sample.request_id for sample in samples]

        return await self.run(end)

    async def pause(self, *, abort: bool = False) -> None:
        """Begin no request until ``resume``; those asked for meanwhile wait in their order. Returns when what ran has
        ended, which ``abort`` hastens: the callers get what was sampled so far.

        Raises RuntimeError if it is paused already.
        """
        mine = object()

        def hold(engine: Engine) -> None:
            if self._pause is not None:
                raise RuntimeError("the engine is paused already; resume() comes first")
            self._pause = mine
            if abort:
                self._resolve(engine.abort())

        try:
            await self.run(hold)
            await self._until(lambda: not self._engine.has_unfinished)
        except BaseException:
            self._post(lambda: self._go_on(mine), lambda _: None, quietly=True)
            raise

    async def resume(self) -> None:
        """Begin what the pause held back. Does nothing if it is not paused."""
        await self.run(lambda _: self._go_on(self._pause))

    @asynccontextmanager
    async def paused(self, *, abort: bool = False) -> AsyncIterator[None]:
        """``pause`` on the way in, ``resume`` on the way out: around an update of the weights."""
        await self.pause(abort=abort)
        try:
            yield
        finally:
            await self.resume()

    async def drain(self) -> None:
        """Take no new request, for good, and return when the last one has ended."""
        with self._wake:
            self._refusal = self._refusal or EngineClosedError("the engine drains: it ends what runs and takes no more")
        await self._until(lambda: not self._num_reserved)

    async def run(self, call: Callable[[Engine], T]) -> T:
        """``call(engine)`` on the engine's thread; its result, or what it raises."""
        return await asyncio.wrap_future(self.submit(call))

    def submit(self, call: Callable[[Engine], T]) -> Future[T]:
        """``run`` for callers without an event loop."""
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call(self._engine))
            except BaseException as error:
                future.set_exception(error)

        self._post(answer, partial(_fail, future))
        return future

    def close(self) -> None:
        """Ends the thread after the step that it is in. Callers that wait get EngineClosedError."""
        with self._wake:
            self._closed = True
            self._refusal = self._failure or EngineClosedError("the engine is closed")
            self._wake.notify()
        self._thread.join()

    async def _until(self, condition: Callable[[], bool]) -> None:
        future: Future[None] = Future()
        self._post(lambda: self._waiters.append((condition, future)), partial(_fail, future))
        await asyncio.wrap_future(future)

    def _reserve(self, orders: Sequence[Order]) -> None:
        with self._wake:
            if self._refusal is not None:
                raise copy.copy(self._refusal)
            limit, wanted = self._max_unfinished, sum(order.ask.num_samples for order in orders)
            if limit is not None and wanted > limit:
                raise ValueError(
                    f"{wanted} samples at once are more than the {limit} that the engine runs and queues; ask for "
                    "fewer, or raise max_queue"
                )
            if limit is not None and self._num_reserved + wanted > limit:
                raise QueueFullError(
                    f"{self._num_reserved} samples are unfinished and {wanted} more were asked for; the engine runs "
                    f"and queues at most {limit}; try again later"
                )
            self._num_reserved += wanted
            for order in orders:
                order.num_reserved = order.ask.num_samples
                self._calls.append((partial(self._begin, order), partial(_fail, order.added)))
            self._wake.notify()

    def _post(
        self, call: Callable[[], None], on_failure: Callable[[BaseException], None], *, quietly: bool = False
    ) -> None:
        with self._wake:
            if self._closed or self._failure is not None:
                if quietly:
                    return
                raise copy.copy(self._refusal or EngineClosedError("the engine is closed"))
            self._calls.append((call, on_failure))
            self._wake.notify()

    def _drive(self) -> None:
        try:
            self._loop()
            self._end(EngineClosedError("the engine was closed"))
        except BaseException as error:
            self._die(error)
        self._engine.observe_tokens(None)
        self._send()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._calls or self._closed or self._engine.has_unfinished):
                    self._wake.wait()
                calls, self._calls = self._calls, []
            for call, _ in calls:
                call()
            if self._closed:
                return
            if self._engine.has_unfinished:
                self._step()
            self._send()
            self._tell_waiters()

    def _begin(self, order: Order) -> None:
        if order.is_gone:
            return
        if self._pause is not None:
            self._held.append(order)
        else:
            self._start(order)

    def _start_held(self, request_ids: Collection[str]) -> None:
        """Those of these requests that a pause holds back, so that they can be aborted as others are."""
        named = [order for order in self._held if order.ask.request_id in request_ids]
        self._held = [order for order in self._held if order not in named]
        for order in named:
            self._start(order)

    def _start(self, order: Order) -> None:
        if not order.added.set_running_or_notify_cancel():
            return  # the withdrawal that follows gives its places back
        try:
            names = self._engine.add_request(*order.ask)
        except BaseException as error:
            self._release(order, order.num_reserved)
            order.added.set_exception(error)
            return
        order.unfinished.update(names)
        self._parts |= {name: (order, index) for index, name in enumerate(names, order.first_index)}
        self._unstarted.update(names)
        if order.stream.live:
            self._live.update(names)
        order.added.set_result(None)

    def _withdraw(self, order: Order) -> None:
        order.is_gone = True
        if order.unfinished:
            self._resolve(self._engine.abort(frozenset(order.unfinished)))
        if order in self._held:
            self._held.remove(order)
        self._release(order, order.num_reserved)

    def _go_on(self, pause: object | None) -> None:
        if pause is None or pause is not self._pause:
            return
        self._pause = None
        held, self._held = self._held, []
        for order in held:
            self._begin(order)

    def _step(self) -> None:
        try:
            self._resolve(self._engine.step())
        except NonFiniteLogprobError as error:
            self._resolve(error.samples)
            for name in error.request_ids:
                self._conclude(name, error=error)
        except _FATAL:
            raise
        except BaseException as error:  # a step without memory, say: it ends what took part, and the engine goes on
            self._end(error)
            self._engine.check_idle()

    def _see(self, request_ids: Sequence[str], output: StepOutput) -> None:
        """The tokens of a step, of which the callers that wait for the end of their samples need none."""
        if self._unstarted:
            for name in self._unstarted.intersection(request_ids):
                self._unstarted.discard(name)
                self._parts[name][0].stream.note_first_token()
        if self._live:
            for name, token, logprob in zip(request_ids, output.token_ids.tolist(), output.logprobs.tolist()):
                if name in self._live:
                    order, index = self._parts[name]
                    self._outbox.setdefault(order.stream.loop, []).append(
                        News(order.stream, index, (token,), (logprob,))
                    )

    def _resolve(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._conclude(sample.request_id, sample=sample)

    def _conclude(self, name: str, *, sample: Sample | None = None, error: BaseException | None = None) -> None:
        part = self._parts.pop(name, None)
        if part is None:
            return
        order, index = part
        shown = name in self._live
        self._unstarted.discard(name)
        self._live.discard(name)
        order.unfinished.discard(name)
        self._release(order, 1)
        if order.is_gone:
            return
        news = News(order.stream, index, sample=sample, error=error)
        if sample is not None and not shown:
            news = news._replace(token_ids=sample.token_ids, logprobs=sample.logprobs.tolist())
        self._outbox.setdefault(order.stream.loop, []).append(news)

    def _release(self, order: Order, places: int) -> None:
        order.num_reserved -= places
        with self._wake:
            self._num_reserved -= places

    def _end(self, error: BaseException) -> None:
        """Everything that runs or is held back, with ``error`` for its callers."""
        for name in list(self._parts):
            self._conclude(name, error=error)
        self._engine.abort_all()
        if self._closed:
            held, self._held = self._held, []
            for order in held:
                self._release(order, order.num_reserved)
                _fail(order.added, error)
            self._fail_waiters(error)

    def _die(self, cause: BaseException) -> None:
        """The thread ends; nobody is left waiting, and whoever comes is told why."""
        failure = EngineFailedError(f"the engine has failed and takes no more requests: {cause}")
        with self._wake:
            self._failure = self._refusal = failure
            calls, self._calls = self._calls, []
        for name in list(self._parts):
            self._conclude(name, error=failure)
        for order in self._held:
            self._release(order, order.num_reserved)
            _fail(order.added, failure)
        for _, on_failure in calls:
            on_failure(failure)
        self._fail_waiters(failure)

    def _tell_waiters(self) -> None:
        if not self._waiters:
            return
        waiters, self._waiters = self._waiters, []
        for condition, future in waiters:
            if not condition():
                self._waiters.append((condition, future))
            elif future.set_running_or_notify_cancel():
                future.set_result(None)

    def _fail_waiters(self, error: BaseException) -> None:
        waiters, self._waiters = self._waiters, []
        for _, future in waiters:
            _fail(future, error)

    def _send(self) -> None:
        """One wake-up per event loop and step, however many callers it has."""
        outbox, self._outbox = self._outbox, {}
        for loop, news in outbox.items():
            try:
                loop.call_soon_threadsafe(deliver, news)
            except RuntimeError:  # the loop is closed, and its callers are gone
                for order, _ in list(self._parts.values()):
                    if order.stream.loop is loop:
                        self._withdraw(order)


def _fail(future: Future[T], error: BaseException) -> None:
    """Unless its caller is gone."""
    if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
        future.set_exception(error)
