"""An engine that a thread of its own drives, for any number of callers on event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import TypeVar

from vexact.rollout.engine import Engine
from vexact.rollout.sampling.sampler import NonFiniteLogprobError
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.types import Sample

T = TypeVar("T")


class AsyncEngine:
    """Everything happens on the thread, between two steps, in the order in which it was asked for.

    Nobody else may call ``engine``. Which requests share a batch depends on when they come; no bit of a sample does.

    Example::

        engine = AsyncEngine(Engine("path/to/model"))
        samples = await engine.generate([1, 2, 3], SamplingParams(max_tokens=32), "mine")
        await engine.run(lambda engine: engine.update_weights(named, version=1))
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: list[Callable[[], None]] = []
        self._waiting: dict[str, Future[Sample]] = {}  # of the thread alone
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling_params: SamplingParams, request_id: str | None = None
    ) -> list[Sample]:
        """The n samples of one prompt. A caller that is cancelled takes its request along.

        Raises what ``Engine.add_request`` raises; NonFiniteLogprobError for a sample of its own; and what ended a step
        in which it had part.
        """
        futures = await self.run(lambda engine: self._add(prompt_token_ids, sampling_params, request_id))
        try:
            return await asyncio.gather(*(asyncio.wrap_future(future) for future in futures.values()))
        except asyncio.CancelledError:
            self._post(lambda: self._resolve(self._engine.abort(futures)))
            raise

    async def abort(self, request_ids: Collection[str] | None = None) -> list[str]:
        """Ends these requests, or all: their callers get what was sampled so far. Returns the ids of those it ended."""

        def end(engine: Engine) -> list[str]:
            samples = engine.abort(request_ids)
            self._resolve(samples)
            return [sample.request_id for sample in samples]

        return await self.run(end)

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

        self._post(answer)
        return future

    def close(self) -> None:
        """Ends the thread after the step that it is in. Callers that wait get RuntimeError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.append(call)
            self._wake.notify()

    def _drive(self) -> None:
        while True:
            with self._wake:
                while not (self._calls or self._closed or self._engine.has_unfinished):
                    self._wake.wait()
                calls, self._calls = self._calls, []
            for call in calls:
                call()
            if self._closed:
                return self._end(RuntimeError("the engine was closed"))
            if self._engine.has_unfinished:
                self._step()

    def _add(self, prompt: Sequence[int], params: SamplingParams, request_id: str | None) -> dict[str, Future[Sample]]:
        names = self._engine.add_request(prompt, params, request_id)
        futures: dict[str, Future[Sample]] = {name: Future() for name in names}
        self._waiting |= futures
        return futures

    def _step(self) -> None:
        try:
            self._resolve(self._engine.step())
        except NonFiniteLogprobError as error:
            self._resolve(error.samples)
            for name in error.request_ids:
                _set(self._waiting.pop(name, None), error)
        except BaseException as error:
            self._end(error)

    def _resolve(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            _set(self._waiting.pop(sample.request_id, None), sample)

    def _end(self, error: BaseException) -> None:
        self._engine.abort_all()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            _set(future, error)


def _set(future: Future[Sample] | None, outcome: Sample | BaseException) -> None:
    """Unless its caller is gone."""
    if future is None or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Sample):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
