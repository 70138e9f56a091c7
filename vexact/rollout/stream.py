"""What a caller of an ``AsyncEngine`` holds of its request: tokens as they come, samples as they end, or the error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from vexact.rollout.requests.intake import sample_ids
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.types import Sample


class EngineClosedError(RuntimeError):
    """The engine takes no requests any more: it was closed, or it drains."""


class EngineFailedError(RuntimeError):
    """The engine is in a state of which it cannot be trusted to come back: start a new one."""

    is_bug = True


class QueueFullError(RuntimeError):
    """As many requests as allowed are unfinished; come back later."""


@dataclass(slots=True)
class Delta:
    """What one sample of a request has got since its last delta; ``sample`` is the whole of it once it has ended."""

    index: int  # among the samples of the stream: those of the first request, then those of the second, …
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of these tokens; each is a float32
    sample: Sample | None = None


class News(NamedTuple):
    """What the engine's thread has to say to one stream: tokens, an ended sample, or an error."""

    stream: Stream
    which: int  # of its samples
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    sample: Sample | None = None
    error: BaseException | None = None


class Ask(NamedTuple):
    """The arguments of ``Engine.add_request``."""

    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
    request_id: str | None = None
    draw_id: str | None = None

    @property
    def num_samples(self) -> int:
        return self.sampling_params.n if isinstance(self.sampling_params, SamplingParams) else 1

    @property
    def names(self) -> list[str]:
        """Of its samples; none before the engine has named the request itself."""
        return sample_ids(self.request_id, self.num_samples) if isinstance(self.request_id, str) else []


@dataclass(slots=True, eq=False)
class Order:
    """A request on its way to the engine; belongs to the engine's thread once it is posted."""

    ask: Ask
    stream: Stream
    first_index: int  # of its samples in the stream
    added: Future[None] = field(default_factory=Future)
    unfinished: set[str] = field(default_factory=set)  # ids of its samples that are in the engine
    aborted: set[str] = field(default_factory=set)  # ids of its samples that ended while a pause held it
    num_reserved: int = 0  # places in the queue that it holds
    is_gone: bool = False  # its caller left


class Stream:
    """An asynchronous iterator over the ``Delta`` of the samples of one or more requests, on their caller's event loop.

    A consumer that is late gets what has come meanwhile in one delta per sample: nothing piles up but the tokens.
    Raises what ended the request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, num_samples: int, *, live: bool) -> None:
        """``live``: deltas come with every step; otherwise one per sample, when it has ended."""
        self.loop, self.live = loop, live
        self.asked_at = time.monotonic()
        self.first_tokens_at: dict[int, float] = {}  # by sample, time.monotonic() of the engine's thread
        self._num_left = num_samples
        self._pending: dict[int, Delta] = {}
        self._error: BaseException | None = None
        self._has_news = asyncio.Event()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._num_left:
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        delta = self._pending.pop(next(iter(self._pending)))
        self._num_left -= delta.sample is not None
        return delta

    @property
    def first_token_at(self) -> float | None:
        """Of the sample that got its first token before the others."""
        return min(tuple(self.first_tokens_at.values()), default=None)

    def note_first_token(self, index: int) -> None:
        """On the engine's thread."""
        self.first_tokens_at[index] = time.monotonic()

    def leave(self) -> None:
        """Nothing comes any more: whoever goes on reading is told so, and not left waiting."""
        if self._error is None and self._num_left:
            self._error = RuntimeError("nothing more comes: this stream is read inside the block that opened it")
        self._has_news.set()

    def put(self, news: News) -> None:
        """On the caller's loop."""
        if news.error is not None:
            self._error = news.error
        else:
            delta = self._pending.setdefault(news.which, Delta(news.which))
            delta.token_ids.extend(news.token_ids)
            delta.logprobs.extend(news.logprobs)
            delta.sample = news.sample
        self._has_news.set()


def deliver(news: Sequence[News]) -> None:
    """Gives every stream of one loop its news; runs on that loop."""
    for one in news:
        one.stream.put(one)
