"""Thousands of mixed requests to one server, many of whose clients leave: nothing may leak, get lost or differ.

    python -m benchmarks.rollout.soak --requests 10000 --out soak.json                # a tiny model on the CPU, minutes
    python -m benchmarks.rollout.soak --model_path DIR --device cuda --requests 10000 # any checkpoint

Requests come from the official client: whole or streamed, 1 to 3 samples, prompts and lengths of all sizes, some with
stop strings; a share leaves early (a closed stream, a cancelled call), some are aborted in the engine. The cache is too
small for all that run at once, so requests are preempted; the queue is short, so requests are refused and come again.

Every token and log-probability that a client got is compared with those of a second engine that was called directly.
At the end no page, slot, request, stream, task or file may be left, and memory must not have grown since the first
third. Exit 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai

from benchmarks.shared.options import at_least_one, out_file
from vexact.models import ModelConfig, random_model
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.stream import Stream
from vexact.serve.server import Server
from vexact.serve.service import Service
from vexact.serve.settings import ServeSettings

WAYS = ("whole", "stream", "leave whole", "leave stream", "abort")
WEIGHTS = (35, 35, 10, 12, 8)
TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
}


@dataclass(slots=True)
class Ask:
    """One request, and how its client behaves."""

    name: str
    prompt: list[int]
    params: dict[str, Any]
    way: str
    patience: float  # seconds, or chunks, until the client leaves


@dataclass(slots=True)
class Outcome:
    """What the clients saw."""

    ways: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    tokens: int = 0  # compared
    different: list[str] = field(default_factory=list)  # request names
    lost: list[str] = field(default_factory=list)


def draw_asks(count: int, vocab_size: int, seed: int) -> list[Ask]:
    draw = random.Random(seed)
    shared = [draw.randrange(2, vocab_size) for _ in range(64)]  # a prefix that many have
    asks = []
    for index in range(count):
        prompt = shared[: draw.choice([0, 0, 16, 64])] + [
            draw.randrange(2, vocab_size) for _ in range(draw.randint(1, 24))
        ]
        params = {
            "max_tokens": min(96, 1 + int(draw.lognormvariate(2.3, 0.9))),
            "temperature": draw.choice([0.0, 0.7, 1.0]),
            "top_p": draw.choice([1.0, 0.9]),
            "n": draw.choice([1, 1, 1, 2, 3]),
            "stop": draw.choice([None, None, ["e"], ["<eos>", "ab"]]),
        }
        way = draw.choices(WAYS, WEIGHTS)[0]
        asks.append(Ask(f"soak{index}", prompt, params, way, draw.random() * (0.2 if way == "leave whole" else 5)))
    return asks


def direct(engine: Engine, asks: list[Ask]) -> dict[str, list[Any]]:
    """The samples of every request, by a call that no server has part in."""
    params = [SamplingParams(**ask.params) for ask in asks]
    samples = iter(engine.generate([ask.prompt for ask in asks], params, [ask.name for ask in asks]))
    return {ask.name: [next(samples) for _ in range(ask.params["n"])] for ask in asks}


class Soak:
    """Sends all requests, ``concurrency`` at a time."""

    def __init__(self, server: Server, asks: list[Ask], expected: dict[str, list[Any]], concurrency: int) -> None:
        self._server, self._asks, self._expected, self._concurrency = server, asks, expected, concurrency
        self.outcome = Outcome()
        self.memory: list[int] = []  # bytes, after every tenth of the requests

    async def run(self) -> None:
        limits = openai.DefaultAsyncHttpxClient(timeout=600)
        async with openai.AsyncOpenAI(
            base_url=f"{self._server.url}/v1", api_key="none", max_retries=0, http_client=limits
        ) as client:
            waiting = iter(self._asks)
            await asyncio.gather(*(self._work(client, waiting) for _ in range(self._concurrency)))

    async def _work(self, client: openai.AsyncOpenAI, waiting: Any) -> None:
        for ask in waiting:
            while not await self._tried(client, ask):
                self.outcome.retries += 1
                await asyncio.sleep(0.1)
            self.outcome.ways[ask.way] += 1
            if self.outcome.ways.total() % max(1, len(self._asks) // 10) == 0:
                gc.collect()
                self.memory.append(resident_bytes())

    async def _tried(self, client: openai.AsyncOpenAI, ask: Ask) -> bool:
        """Whether the request was let in."""
        own = {name: ask.params[name] for name in ("top_k", "min_p") if name in ask.params}  # not OpenAI's
        own |= {"request_id": ask.name, "return_token_ids": True}
        asked: dict[str, Any] = {"model": "soak", "prompt": ask.prompt, "logprobs": 0, "extra_body": own}
        asked |= {name: value for name, value in ask.params.items() if value is not None and name not in own}
        try:
            if ask.way == "leave whole":
                await asyncio.wait_for(client.completions.create(**asked), ask.patience)
            elif ask.way == "whole":
                answer = await client.completions.create(**asked)
                for choice in answer.choices:
                    self._compare(
                        ask, choice.index, choice.token_ids, choice.logprobs, choice.finish_reason, choice.text
                    )
            else:
                await self._streamed(client, ask, asked)
        except TimeoutError:
            pass
        except openai.RateLimitError:
            return False
        except openai.APIError as error:
            self.outcome.lost.append(f"{ask.name}: {error}")
        return True

    async def _streamed(self, client: openai.AsyncOpenAI, ask: Ask, asked: dict[str, Any]) -> None:
        count = ask.params["n"]
        ids: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        texts, ends = [""] * count, [""] * count
        async with await client.completions.create(**asked, stream=True) as stream:
            number = 0
            async for chunk in stream:
                (choice,) = chunk.choices
                ids[choice.index] += choice.token_ids
                logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
                texts[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason or ""
                number += 1
                if number > ask.patience and ask.way == "leave stream":
                    return
                if number == 1 and ask.way == "abort":
                    await self._server._service.engine.abort({chunk.id})
        for index in range(count):
            self._compare(ask, index, ids[index], logprobs[index], ends[index], texts[index])

    def _compare(self, ask: Ask, index: int, ids: list[int], logprobs: Any, reason: str, text: str) -> None:
        sample = self._expected[ask.name][index]
        given = np.float32(logprobs if isinstance(logprobs, list) else logprobs.token_logprobs)
        count = len(ids) if reason == "abort" else len(sample.token_ids)
        self.outcome.tokens += len(ids)
        same = tuple(ids) == sample.token_ids[:count] and np.array_equal(given, sample.logprobs[:count])
        if not same or (reason != "abort" and (reason, text) != (sample.finish_reason, sample.text)):
            self.outcome.different.append(f"{ask.name}/{index}")
        if reason not in ("stop", "length") and ask.way != "abort":
            self.outcome.lost.append(f"{ask.name}/{index}: {reason or 'no end'}")


def soak(make: Any, requests: int, *, concurrency: int = 48, max_queue: int = 16, seed: int = 0) -> dict[str, Any]:
    """Runs it; ``make(**config)`` builds an engine. The report's ``problems`` is empty if all is well."""
    roomy = make(max_num_seqs=32)
    asks = draw_asks(requests, roomy.vocab_size, seed)
    expected = direct(roomy, asks)
    del roomy
    engine = make(max_num_seqs=16, page_size=4, num_pages=80)
    files = len(list(Path("/proc/self/fd").iterdir()))
    service = Service(engine, ServeSettings(("soak",), port=0, max_queue=max_queue))
    server = Server(service)
    server.start()
    started = time.monotonic()
    run = Soak(server, asks, expected, concurrency)
    asyncio.run(run.run())
    seconds = time.monotonic() - started
    deadline = time.monotonic() + 300  # of requests whose client has just left
    while service.engine.num_unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    left = {
        "requests": service.engine.num_unfinished,
        "pages": engine._blocks.num_used,
        "slots": engine._state.num_held_slots,
        "records": sum(map(len, (service.engine._parts, service.engine._held, service.engine._live))),
        "ids": len(engine._intake._in_use),
    }
    preemptions = engine.stats()["rollout/preemptions"]
    server.stop()
    service.close()
    engine.check_idle()
    gc.collect()
    left["streams"] = sum(type(one) is Stream for one in gc.get_objects())
    left["files"] = len(list(Path("/proc/self/fd").iterdir())) - files
    grown = run.memory[-1] - run.memory[len(run.memory) // 5]
    outcome = run.outcome
    problems = [f"{count} {what} left" for what, count in left.items() if count > 0]
    problems += [f"different: {name}" for name in outcome.different] + [f"lost: {name}" for name in outcome.lost]
    if outcome.ways.total() != requests:
        problems.append(f"{outcome.ways.total()} of {requests} requests were answered")
    if grown > 32 * 2**20:
        problems.append(f"memory grew by {grown / 2**20:.0f} MiB")
    return {
        "requests": requests,
        "ways": dict(outcome.ways),
        "refused_and_sent_again": outcome.retries,
        "preemptions": int(preemptions),
        "tokens_compared": outcome.tokens,
        "different": len(outcome.different),
        "memory_grown_mib": round(grown / 2**20, 1),
        "seconds": round(seconds, 1),
        "problems": problems,
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tiny_engine(**config: Any) -> Engine:
    """A random model of one layer that writes bytes."""
    tokenizer = byte_tokenizer()
    model = random_model(ModelConfig.from_hf_dict(TINY | {"vocab_size": len(tokenizer)}), seed=0)
    return Engine(model=model, tokenizer=tokenizer, eos_token_ids=(tokenizer.eos_token_id,), **config)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=at_least_one, default=10_000)
    parser.add_argument("--concurrency", type=at_least_one, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model_path", help="default: a tiny random model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()

    def make(**config: Any) -> Engine:
        if arguments.model_path is None:
            return tiny_engine(**config)
        dtype = "bfloat16" if arguments.device == "cuda" else "float32"
        return Engine(arguments.model_path, dtype=dtype, device=arguments.device, max_model_len=512, **config)

    report = soak(make, arguments.requests, concurrency=arguments.concurrency, seed=arguments.seed)
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
