"""An engine that a thread of its own drives, for any number of callers on event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from itertools import accumulate
from typing import TypeVar

from vexact.rollout.engine import Engine
from vexact.rollout.engine_thread import EngineThread, fail
from vexact.rollout.requests.request import id_set
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.rollout.stream import Ask, EngineClosedError, Order, Stream
from vexact.types import Sample

T = TypeVar("T")


class AsyncEngine(EngineThread):
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
            stream.leave()
            for order in orders:
                if order.num_reserved:  # it has neither ended nor failed
                    self._post(partial(self._withdraw, order), lambda _: None, quietly=True)

    async def abort(self, request_ids: Iterable[str] | None = None) -> list[str]:
        """Ends these requests, or all: their callers get what was sampled so far. Returns the ids of the samples ended.

        An id is that of a request or of one of its samples; one may stand alone. All does not mean those that a pause
        holds back; named, they end at once, and the other samples of their requests go on after ``resume``.
        """
        asked = request_ids if request_ids is None else id_set(request_ids)

        def end(engine: Engine) -> list[str]:
            samples = engine.abort(asked)
            self._resolve(samples)
            held = [] if asked is None else self._abort_held(asked)
            return [*(sample.request_id for sample in samples), *held]

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

    async def _until(self, condition: Callable[[], bool]) -> None:
        future: Future[None] = Future()
        self._post(lambda: self._waiters.append((condition, future)), partial(fail, future))
        await asyncio.wrap_future(future)
