"""Random requests under random settings, all of whose tokens the training forward scores again; exit 1 on another bit.

    python -m benchmarks.rollout.rescore --tokens 20000                                  # tiny model on the CPU
    python -m benchmarks.rollout.rescore --shape qwen3-1.7b --layers 6 --tokens 2000000 --out rescore.json
    python -m benchmarks.rollout.rescore --control                                       # must find differences

A round is one engine with settings drawn at random: asynchronous scheduling, CUDA graphs and their sizes, page size,
tokens per step, chunked prefill, prefix cache, slots, and a cache so small that requests are preempted, or a large one.
It serves a set of requests (shared prefixes, all lengths, temperatures, filters, stop strings, several samples) in one
of four ways: all in one call; as they come, step by step, some aborted; by ``AsyncEngine`` with some callers leaving;
over HTTP from the official client, some streams left or aborted. Order and concurrency are drawn, too.

Rounds take turns on a set, so that every request runs under several settings: its tokens, log-probabilities and
thresholds must be those of the first round, where it came in one call. What was sampled is then packed at random and
scored by the training forward: log-probabilities, and where there are experts routes, bit for bit. What came over HTTP
has no thresholds; it is compared with the first round's samples, which were rescored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rollout import soak
from benchmarks.rollout.soak import Ask, Soak
from benchmarks.shared.clock import machine
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.trainer.end_to_end import random_checkpoint
from benchmarks.trainer.grpo_run import SHAPES
from vexact.device import resolve_device
from vexact.models import ModelConfig, load_model, random_model
from vexact.models.decoder import CausalLM
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.async_engine import AsyncEngine
from vexact.serve.server import Server
from vexact.serve.service import Service
from vexact.serve.settings import ServeSettings
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.batches.packing import pack
from vexact.training.passes.forward import routed_scores
from vexact.types import Sample

WAYS = ("one call", "as they come", "AsyncEngine", "HTTP")
ROUNDS = 4  # of a set, after the first


@dataclass(frozen=True, slots=True)
class Size:
    """How much a set holds."""

    requests: int
    prompt: int  # most tokens
    new: int  # most tokens
    mean_new: float
    slots: tuple[int, ...]
    pages: tuple[int, ...]  # page sizes
    callers: tuple[int, ...]  # at once
    over_http: int  # of the requests

    @property
    def longest(self) -> int:
        return self.prompt + self.new


SIZES = {
    "small": Size(24, 40, 48, 12, (1, 3, 8, 24), (1, 4, 7, 16, 64), (1, 7, 64), 24),
    "large": Size(640, 400, 512, 150, (48, 200, 256), (16, 64, 80, 256), (50, 300), 120),
}


@dataclass(slots=True)
class Found:
    """What all rounds came to."""

    rounds: Counter[str] = field(default_factory=Counter)  # by way
    settings: Counter[str] = field(default_factory=Counter)  # rounds that had them
    tokens: int = 0  # rescored
    logprobs_different: int = 0
    routes: int = 0
    routes_different: int = 0
    compared: int = 0  # tokens, with those of the same request in the set's first round
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # of events: preemptions, aborts, …

    @property
    def is_clean(self) -> bool:
        return not (self.logprobs_different or self.routes_different or self.problems)

    def record(self) -> dict[str, Any]:
        return {
            "tokens_rescored": self.tokens,
            "log_probs_different": self.logprobs_different,
            "routes_compared": self.routes,
            "routes_different": self.routes_different,
            "tokens_compared_across_settings": self.compared,
            "problems": self.problems[:20],
            "rounds": dict(self.rounds),
            "rounds_with": dict(sorted(self.settings.items())),
            "events": {name: int(count) for name, count in self.counts.items()},
        }


class Rescore:
    """Draws, samples, scores. Everything follows from ``seed``, but for when callers leave."""

    def __init__(self, model: CausalLM, scorer: CausalLM, size: Size, seed: int) -> None:
        """``scorer`` computes the training forward; the same model, unless differences are to be found."""
        self.model, self.scorer, self.size = model, scorer, size
        self.draw = random.Random(seed)
        self.tokenizer = byte_tokenizer(model.config.vocab_size)
        self.found = Found()
        self._sets = 0

    def run(self, tokens: int, seconds: float) -> Iterator[str]:
        """Until so many tokens were rescored or the time is up; says what each round was."""
        deadline = time.monotonic() + seconds
        while self.found.tokens < tokens and time.monotonic() < deadline:
            asks, expected = self._asks(), {}
            for way in ("one call", *self.draw.sample(WAYS, ROUNDS)):
                config = self._settings()
                yield f"{way}: {config}"
                engine = self._engine(config)
                samples = self._play(engine, way, asks, expected)
                self._count(engine, way, config)
                del engine
                expected = expected or {sample.request_id: sample for sample in samples}
                self._compare(samples, expected)
                self._rescore([sample for sample in samples if sample.token_ids])
                if self.found.tokens >= tokens or time.monotonic() > deadline:
                    break

    def _asks(self) -> list[Ask]:
        """Requests that share prefixes, and how their callers behave."""
        draw, size, vocab = self.draw, self.size, self.model.config.vocab_size
        prefix = [draw.randrange(2, vocab) for _ in range(size.prompt)]
        self._sets += 1
        asks = []
        for index in range(size.requests):
            shared = draw.choice((0, 0, size.prompt // 4, size.prompt // 2))
            own = draw.randint(1, size.prompt - shared)
            params = {
                "max_tokens": min(size.new, 1 + int(draw.expovariate(1 / size.mean_new))),
                "temperature": draw.choice((0.0, 0.3, 0.7, 1.0, 1.0, 1.7)),
                "top_p": draw.choice((1.0, 1.0, 0.9, 0.5)),
                "top_k": draw.choice((-1, -1, 1, 5, 50)),
                "min_p": draw.choice((0.0, 0.0, 0.05)),
                "n": draw.choice((1, 1, 1, 2, 3)),
                "stop": draw.choice((None, None, ["e"], ["ab", "<eos>"])),
            }
            prompt = prefix[:shared] + [draw.randrange(2, vocab) for _ in range(own)]
            way = draw.choices(soak.WAYS, soak.WEIGHTS)[0]
            asks.append(Ask(f"set{self._sets}-{index}", prompt, params, way, draw.random() * 0.2))
        return asks

    def _settings(self) -> dict[str, Any]:
        draw, size = self.draw, self.size
        slots, page = draw.choice(size.slots), draw.choice(size.pages)
        tight = draw.random() < 0.5
        wanted = slots * (size.prompt / 2 + size.mean_new) * (draw.uniform(0.05, 0.3) if tight else 2)
        chunks = draw.random() < 0.8
        least = slots + 1 if chunks else size.longest
        return {
            "async_scheduling": draw.random() < 0.5,
            "page_size": page,
            "num_pages": -(-max(size.longest, int(wanted)) // page),
            "max_num_seqs": slots,
            "max_model_len": size.longest,
            "enable_chunked_prefill": chunks,
            "max_num_batched_tokens": int(least * (max(4096, 4 * least) / least) ** draw.random()),
            "enable_prefix_caching": draw.random() < 0.5,
            "enforce_eager": draw.random() < 0.3,
            "cudagraph_capture_sizes": draw.choice((None, (1, 8, slots), (2, 64))),
        }

    def _engine(self, config: dict[str, Any]) -> Engine:
        return Engine(
            model=self.model, tokenizer=self.tokenizer, eos_token_ids=(self.tokenizer.eos_token_id,), **config
        )

    def _play(self, engine: Engine, way: str, asks: list[Ask], expected: dict[str, Sample]) -> list[Sample]:
        order = self.draw.sample(asks, len(asks))
        if way == "HTTP":
            self._over_http(engine, order[: self.size.over_http], expected)
            return []
        if way == "AsyncEngine":
            return asyncio.run(self._in_process(engine, order))
        if way == "as they come":
            return self._step_by_step(engine, order)
        return engine.generate(
            [ask.prompt for ask in order], [SamplingParams(**ask.params) for ask in order], [ask.name for ask in order]
        )

    def _step_by_step(self, engine: Engine, order: list[Ask]) -> list[Sample]:
        """A few come before every step, and now and then one goes."""
        draw, waiting, samples = self.draw, list(order), []
        running: list[str] = []
        while waiting or engine.has_unfinished:
            for ask in [waiting.pop() for _ in range(min(len(waiting), draw.randint(0, 8)))]:
                running += engine.add_request(ask.prompt, SamplingParams(**ask.params), ask.name)
            if running and draw.random() < 0.1:
                aborted = engine.abort({running.pop(draw.randrange(len(running)))})
                self.found.counts["aborts"] += len(aborted)
                samples += aborted
            samples += engine.step()
        return samples

    async def _in_process(self, engine: Engine, order: list[Ask]) -> list[Sample]:
        served, samples, waiting = AsyncEngine(engine), [], iter(order)

        async def work() -> None:
            for ask in waiting:
                task = asyncio.create_task(served.generate(ask.prompt, SamplingParams(**ask.params), ask.name))
                if ask.way not in ("whole", "stream"):
                    await asyncio.wait({task}, timeout=ask.patience)
                if ask.way.startswith("leave"):
                    task.cancel()
                elif ask.way == "abort":
                    self.found.counts["aborts"] += len(await served.abort({ask.name}))
                try:
                    samples.extend(await task)
                except asyncio.CancelledError:
                    self.found.counts["callers that left"] += 1

        try:
            await asyncio.gather(*(work() for _ in range(self.draw.choice(self.size.callers))))
            await served.drain()
        finally:
            served.close()
        return samples

    def _over_http(self, engine: Engine, order: list[Ask], expected: dict[str, Sample]) -> None:
        by_name = {ask.name: [expected[name] for name in sample_names(ask)] for ask in order}
        service = Service(engine, ServeSettings(("soak",), port=0, max_queue=4 * len(order)))
        server = Server(service)
        server.start()
        run = Soak(server, order, by_name, concurrency=self.draw.choice(self.size.callers))
        try:
            asyncio.run(run.run())
        finally:
            server.stop()
            service.close()
        self.found.compared += run.outcome.tokens
        self.found.counts["tokens over HTTP"] += run.outcome.tokens
        self.found.problems += [f"over HTTP: {name}" for name in (*run.outcome.different, *run.outcome.lost)]

    def _count(self, engine: Engine, way: str, config: dict[str, Any]) -> None:
        found, stats = self.found, engine.stats()
        engine.check_idle()
        found.rounds[way] += 1
        found.settings.update(name for name, value in config.items() if value is True)
        found.counts["preemptions"] += int(stats["rollout/preemptions"])
        found.settings["prefix hits"] += stats["rollout/prefix_hit_ratio"] > 0
        found.settings["steps in graphs"] += stats["rollout/graph_ratio"] > 0
        found.settings["preemptions"] += stats["rollout/preemptions"] > 0

    def _compare(self, samples: Sequence[Sample], expected: dict[str, Sample]) -> None:
        for sample in samples:
            first, count = expected[sample.request_id], len(sample.token_ids)
            whole = sample.finish_reason == "abort" or (sample.finish_reason, sample.text) == (
                first.finish_reason,
                first.text,
            )
            same = sample.token_ids == first.token_ids[:count] and whole
            same &= equal_bits(sample.logprobs, first.logprobs[:count]) == count
            same &= equal_bits(sample.min_logits, first.min_logits[:count]) == count
            self.found.compared += 0 if sample is first else count
            if not same:
                self.found.problems.append(f"{sample.request_id} differs from the first round")

    @torch.no_grad()
    def _rescore(self, samples: list[Sample]) -> None:
        sequences = [TokenSequence(s.prompt_token_ids, s.token_ids, s.inv_temperature, s.min_logits) for s in samples]
        lengths = [sequence.num_input_tokens for sequence in sequences]
        budget = max(max(lengths, default=1), int(self.size.longest * 4 ** self.draw.uniform(0, 2.5)))
        names = [str(self.draw.random()) for _ in samples]  # which shuffles them
        for group in pack(lengths, budget, balance=True, names=names):
            batch = pack_tokens([sequences[i] for i in group], self.scorer.lm_head_weight.device)
            scores, routes = routed_scores(self.scorer, batch)
            given = np.concatenate([samples[i].logprobs for i in group])
            self.found.tokens += len(given)
            self.found.logprobs_different += len(given) - equal_bits(given, scores.logprobs.cpu().numpy())
            if routes is not None:
                digests = np.concatenate([samples[i].route_digests for i in group])
                self.found.routes += len(digests)
                self.found.routes_different += int((digests != routes.cpu().numpy()).sum())


def sample_names(ask: Ask) -> list[str]:
    count = ask.params["n"]
    return [ask.name] if count == 1 else [f"{ask.name}/{index}" for index in range(count)]


def equal_bits(first: np.ndarray, second: np.ndarray) -> int:
    """How many of two fp32 arrays are the same."""
    return int((first.view(np.int32) == second.view(np.int32)).sum())


def models(arguments: argparse.Namespace) -> tuple[CausalLM, CausalLM]:
    """The model that samples and the one that scores."""
    if arguments.shape is None:
        raw = soak.TINY | {"vocab_size": len(byte_tokenizer())}
        model, other = (random_model(ModelConfig.from_hf_dict(raw), seed=0) for _ in range(2))
    else:
        raw = SHAPES[arguments.shape].raw | {"eos_token_id": 1, "rope_theta": 1e6}
        raw |= {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        with tempfile.TemporaryDirectory() as folder:
            path = random_checkpoint(raw, Path(folder) / "model")
            model = load_model(path, dtype=dtype, device=resolve_device("auto"))
            other = load_model(path, dtype=dtype, device=resolve_device("auto")) if arguments.control else model
    if not arguments.control:
        return model, model
    with torch.no_grad():
        weight = other.norm.weight
        weight[0] = (
            torch.nextafter(weight[0].float(), torch.tensor(2.0)) if weight.dtype == torch.float32 else 1.0078125
        )
    return model, other


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least_one, default=20_000, help="to rescore")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no round begins")
    parser.add_argument("--shape", choices=SHAPES, help="default: one layer of 32 channels")
    parser.add_argument("--layers", type=at_least_one)
    size = "large" if torch.cuda.is_available() else "small"
    parser.add_argument("--size", choices=SIZES, default=size, help="of the requests and the batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", action="store_true", help="score with one weight that is a unit too large")
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args(given)
    rescore = Rescore(*models(arguments), SIZES[arguments.size], arguments.seed)
    started = time.monotonic()
    head = machine() | {"arguments": {name: str(value) for name, value in vars(arguments).items()}}
    for said in rescore.run(arguments.tokens, arguments.seconds):
        print(f"{rescore.found.tokens:>9} tokens, next: {said}", file=sys.stderr, flush=True)
        report = head | {"seconds": round(time.monotonic() - started, 1)} | rescore.found.record()
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    report = head | {"seconds": round(time.monotonic() - started, 1)} | rescore.found.record()
    print(json.dumps(report, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if rescore.found.is_clean and rescore.found.tokens else 1


if __name__ == "__main__":
    raise SystemExit(main())
