"""The workload of serving.py, a client that sends it, and what is said of the answers."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

MEAN_NEW, SIGMA, MOST_NEW = 245, 0.7, 1024  # response lengths: log-normal with this mean
PROMPTS = (64, 512)  # prompt lengths: uniform


@dataclass(frozen=True, slots=True)
class Load:
    """One request: random token ids, and exactly so many new ones."""

    prompt: list[int]
    max_tokens: int


@dataclass(slots=True)
class Times:
    """Of one request, in seconds since the run began."""

    sent: float
    first: float = math.nan
    end: float = math.nan
    tokens: int = 0


def draw(count: int, vocab_size: int, seed: int, scale: float = 1.0) -> list[Load]:
    """The same requests for the same arguments, whoever asks. ``scale`` shortens all lengths."""
    chance = random.Random(seed)
    location = math.log(MEAN_NEW) - SIGMA**2 / 2
    loads = []
    for _ in range(count):
        length = max(1, round(chance.randint(*PROMPTS) * scale))
        new = round(min(MOST_NEW, max(1.0, chance.lognormvariate(location, SIGMA))) * scale)
        loads.append(Load([chance.randrange(2, vocab_size) for _ in range(length)], max(2, new)))
    return loads


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests come: a Poisson process, or all at once for an infinite rate."""
    if math.isinf(rate):
        return [0.0] * count
    chance, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += chance.expovariate(rate)
    return times


async def play(
    loads: Sequence[Load], due: Sequence[float], send: Callable[[Load, Times, float], Awaitable[None]]
) -> list[Times]:
    """Sends every request when it is due. ``send`` fills its times, which are relative to the start it is given."""
    start = time.monotonic()

    async def one(load: Load, when: float) -> Times:
        await asyncio.sleep(max(0.0, start + when - time.monotonic()))
        times = Times(time.monotonic() - start)
        await send(load, times, start)
        return times

    return await asyncio.gather(*(one(load, when) for load, when in zip(loads, due, strict=True)))


async def play_http(url: str, model: str, loads: Sequence[Load], due: Sequence[float]) -> list[Times]:
    """Against any server with OpenAI's completions endpoint, streamed."""
    import aiohttp

    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=patience) as session:

        async def send(load: Load, times: Times, start: float) -> None:
            asked = {
                "model": model,
                "prompt": load.prompt,
                "max_tokens": load.max_tokens,
                "ignore_eos": True,
                "temperature": 1.0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            async with session.post(f"{url}/completions", json=asked) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {await answer.text()}")
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.monotonic() - start
                    chunk = json.loads(line[6:])
                    if chunk["choices"]:
                        times.first = now if math.isnan(times.first) else times.first
                        times.end = now
                    if chunk.get("usage"):
                        times.tokens = chunk["usage"]["completion_tokens"]

        return await play(loads, due, send)


def summary(times: Sequence[Times], loads: Sequence[Load]) -> dict[str, Any]:
    """Rates over the whole run, and percentiles over requests. TPOT is the time per token after the first."""
    wanted = sum(load.max_tokens for load in loads)
    sampled = sum(one.tokens for one in times)
    if sampled != wanted:
        raise RuntimeError(f"{sampled} tokens came, {wanted} were asked for")
    seconds = max(one.end for one in times) - min(one.sent for one in times)
    figures: dict[str, Any] = {
        "requests": len(times),
        "seconds": round(seconds, 3),
        "req_per_s": round(len(times) / seconds, 3),
        "out_tok_per_s": round(sampled / seconds, 1),
    }
    latencies = {
        "ttft_ms": [one.first - one.sent for one in times],
        "tpot_ms": [(one.end - one.first) / (one.tokens - 1) for one in times],
        "e2e_ms": [one.end - one.sent for one in times],
    }
    for name, values in latencies.items():
        if not any(map(math.isnan, values)):
            figures[name] = {f"p{share}": round(1e3 * percentile(values, share), 2) for share in (50, 95)}
    return figures


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
