"""The thread that drives an engine, and the requests that it has in hand. ``AsyncEngine`` is what callers see of it."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from vexact.rollout.engine import Engine
from vexact.rollout.sampling.sampler import NonFiniteLogprobError, StepOutput
from vexact.rollout.scheduling.block_manager import BlockError, KVIntegrityError
from vexact.rollout.stream import EngineClosedError, EngineFailedError, News, Order, QueueFullError, deliver
from vexact.types import Sample

T = TypeVar("T")

# After one of these neither the pages nor the device can be trusted. Running out of memory is not among them.
_FATAL = (BlockError, KVIntegrityError, torch.AcceleratorError)


class EngineThread:
    """Calls, steps and answers of one engine, one after another.

    What is public, ``_post`` and ``_reserve`` are for callers on any thread; everything else runs on the engine's.
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
            self._miss_taken()

        self._post(answer, partial(fail, future))
        return future

    def close(self) -> None:
        """Ends the thread after the step that it is in. Callers that wait get EngineClosedError."""
        with self._wake:
            self._closed = True
            self._refusal = self._failure or EngineClosedError("the engine is closed")
            self._wake.notify()
        if threading.current_thread() is not self._thread:  # a call that closes ends the thread after itself
            self._thread.join()

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
                self._calls.append((partial(self._begin, order), partial(fail, order.added)))
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

    def _abort_held(self, request_ids: Collection[str]) -> list[str]:
        """Ends samples of requests that a pause holds back, by their ids or their requests'; the others stay held."""
        ended = []
        for order in list(self._held):
            names = set(order.ask.names)
            if names and order.ask.request_id not in request_ids:
                names.intersection_update(request_ids)
            if names - order.aborted:
                ended += self._end_held(order, names - order.aborted)
        return ended

    def _end_held(self, order: Order, names: Collection[str]) -> list[str]:
        try:
            samples = self._engine.abort_unbegun(*order.ask)
        except BaseException as error:  # it could not have begun either
            self._held.remove(order)
            self._release(order, order.num_reserved)
            fail(order.added, error)
            return []
        ended = []
        for index, sample in enumerate(samples, order.first_index):
            if sample.request_id in names:
                order.aborted.add(sample.request_id)
                self._tell(order, index, sample=sample)
                ended.append(sample.request_id)
        if len(order.aborted) == len(samples):
            self._held.remove(order)
            if order.added.set_running_or_notify_cancel():
                order.added.set_result(None)
        return ended

    def _start(self, order: Order) -> None:
        if not order.added.set_running_or_notify_cancel():
            return  # the withdrawal that follows gives its places back
        try:
            names = self._engine.add_request(*order.ask)
        except BaseException as error:
            self._release(order, order.num_reserved)
            order.added.set_exception(error)
            return
        if order.aborted:  # the others draw what they would have drawn beside them
            self._engine.abort(order.aborted, by_sample=True)
        parts = {name: (order, index) for index, name in enumerate(names, order.first_index)}
        names = [name for name in names if name not in order.aborted]
        order.unfinished.update(names)
        self._parts |= {name: parts[name] for name in names}
        self._unstarted.update(names)
        if order.stream.live:
            self._live.update(names)
        order.added.set_result(None)

    def _withdraw(self, order: Order) -> None:
        order.is_gone = True
        if order.unfinished:
            self._resolve(self._engine.abort(order.unfinished, by_sample=True))
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
        self._engine.observe_tokens(self._see if self._live or self._unstarted else None)
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
                order, index = self._parts[name]
                order.stream.note_first_token(index)
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
        self._tell(order, index, sample=sample, error=error, shown=shown)

    def _tell(
        self,
        order: Order,
        index: int,
        *,
        sample: Sample | None = None,
        error: BaseException | None = None,
        shown: bool = False,
    ) -> None:
        """A sample of the request has ended; ``shown`` are its tokens if they came one by one."""
        self._release(order, 1)
        if order.is_gone:
            return
        news = News(order.stream, index, sample=sample, error=error)
        if sample is not None and not shown:
            news = news._replace(token_ids=sample.token_ids, logprobs=sample.logprobs.tolist())
        self._outbox.setdefault(order.stream.loop, []).append(news)

    def _miss_taken(self) -> None:
        """Whoever waits for what a call has taken out of the engine, as ``engine.abort_all()`` does, is told so."""
        if len(self._parts) <= sum(self._engine.num_requests):
            return
        for name in self._parts.keys() - self._engine.unfinished_ids:
            taken = RuntimeError(f"request {name!r} was taken out of the engine by a call; use AsyncEngine.abort")
            self._conclude(name, error=taken)

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
                fail(order.added, error)
            self._fail_calls(error)
            self._fail_waiters(error)

    def _die(self, cause: BaseException) -> None:
        """The thread ends; nobody is left waiting, and whoever comes is told why."""
        failure = EngineFailedError(f"the engine has failed and takes no more requests: {cause}")
        with self._wake:
            self._failure = self._refusal = failure
        for name in list(self._parts):
            self._conclude(name, error=failure)
        for order in self._held:
            self._release(order, order.num_reserved)
            fail(order.added, failure)
        self._fail_calls(failure)
        self._fail_waiters(failure)

    def _fail_calls(self, error: BaseException) -> None:
        """What was asked for and has not begun; nothing more can be asked for by now."""
        with self._wake:
            calls, self._calls = self._calls, []
        for _, on_failure in calls:
            on_failure(error)

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
            fail(future, error)

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


def fail(future: Future[T], error: BaseException) -> None:
    """Unless its caller is gone."""
    if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
        future.set_exception(error)
