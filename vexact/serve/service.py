"""One engine and what its requests need around it: tokenizers of their own, limits, counters."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from vexact.rollout import Engine
from vexact.rollout.async_engine import AsyncEngine
from vexact.rollout.stream import QueueFullError
from vexact.serve.metrics import Metrics
from vexact.serve.prompts import LONG_TEXT, Job, Limits, num_characters, prepare
from vexact.serve.protocol import Body
from vexact.serve.settings import ServeSettings
from vexact.serve.text import TextReader

T = TypeVar("T")


class Service:
    """Drives ``engine`` from now on. A tokenizer must not work on two threads at once, so that of the engine's thread,
    those that read short and long prompts and the one that shows text are four."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.settings = settings
        self.model = settings.model_names[0]
        self.metrics = Metrics(self.model)
        self.reader = TextReader(copy.deepcopy(engine.tokenizer)) if engine.tokenizer is not None else None
        most = engine.config.max_num_seqs + settings.max_queue
        self._limits = Limits(engine.max_model_len, engine.num_cache_tokens, most)
        self.max_model_len = self._limits.longest
        self._short, self._long = _PromptThread(engine.tokenizer), _PromptThread(engine.tokenizer)
        self.engine = AsyncEngine(engine, max_queue=settings.max_queue)

    async def prepare(self, body: Body, sampling: dict[str, Any]) -> Job:
        """The job of a request, made on a thread that may take its time; a long text keeps none but other long texts
        waiting. Raises ValueError, ApiError."""
        thread = self._long if num_characters(body) > LONG_TEXT else self._short
        make = partial(prepare, body, sampling, thread.tokenizer, self._limits)
        return await asyncio.get_running_loop().run_in_executor(thread.executor, make)

    def check_open(self) -> None:
        """Raises what a request would meet at the engine, before its body is read."""
        if self.engine.refusal is not None:
            raise copy.copy(self.engine.refusal)
        if self.engine.is_full:
            raise QueueFullError(f"{self.engine.num_unfinished} samples are unfinished; try again later")

    async def drain(self) -> None:
        """End what runs, by its deadline: then the callers get what was sampled so far."""
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.engine.drain()
        except TimeoutError:
            await self.engine.abort()
            await self.engine.resume()  # what a pause held back is aborted, too
            await self.engine.abort()
            await self.engine.drain()

    def close(self) -> None:
        self.engine.close()
        for thread in (self._short, self._long):
            thread.executor.shutdown(wait=False, cancel_futures=True)


class _PromptThread:
    """A thread and the tokenizer that works on it alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.executor = ThreadPoolExecutor(1, "prompts")
        self.tokenizer = copy.deepcopy(tokenizer)
