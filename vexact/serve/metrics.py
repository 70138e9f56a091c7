"""What the server counts, in Prometheus's text format; names are vLLM's, less its prefix, where it has the same."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from vexact.rollout import Engine
from vexact.rollout.stats import EngineStats
from vexact.rollout.stream import Stream
from vexact.types import Sample

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SLOW = (0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_LENGTHS = tuple(2**power for power in range(18))


class Metrics:
    """One server's counters. ``observe`` and the attributes belong to the event loop."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self.ended = self._counter("request_success", "Samples that ended, by finish reason.", "finished_reason")
        self.failed = self._counter(
            "request_failure", "Requests that were answered with an error, by status.", "status"
        )
        self.disconnected = self._counter("request_disconnect", "Requests whose client left before the answer.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._first = self._histogram(
            "time_to_first_token_seconds", "From the request to a sample's first token.", _SLOW
        )
        self._each = self._histogram("time_per_output_token_seconds", "Per token after a sample's first.", _FAST)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to the end of a sample.", _SLOW)
        self._lengths = self._histogram("request_generation_tokens", "Tokens of a sample.", _LENGTHS)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _LENGTHS)
        self.engine = EngineMetrics(model)
        self.registry.register(self.engine)

    def begin(self, num_prompt_tokens: int) -> None:
        """A prompt is in the engine."""
        self._prompt_tokens.labels(self._model).inc(num_prompt_tokens)
        self._prompts.labels(self._model).observe(num_prompt_tokens)

    def end(self, stream: Stream, index: int, sample: Sample) -> None:
        """The sample of this index in the stream has ended."""
        now, tokens = time.monotonic(), len(sample.token_ids)
        self.ended.labels(self._model, sample.finish_reason).inc()
        self._lengths.labels(self._model).observe(tokens)
        self._whole.labels(self._model).observe(now - stream.asked_at)
        first_at = stream.first_tokens_at.get(index)
        if first_at is not None:
            self._first.labels(self._model).observe(first_at - stream.asked_at)
            if tokens > 1:
                self._each.labels(self._model).observe((now - first_at) / (tokens - 1))

    def fail(self, status: int) -> None:
        self.failed.labels(self._model, str(status)).inc()

    def leave(self) -> None:
        self.disconnected.labels(self._model).inc()

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"vexact:{name}", help, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vexact:{name}", help, ("model_name",), registry=self.registry, buckets=buckets)


class EngineMetrics:
    """What the engine counts, read on its own thread at every scrape (``read``) and told from there (``collect``)."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._totals = EngineStats()
        self._gauges: dict[str, float] = {}

    def read(self, engine: Engine) -> None:
        stats = engine.take_stats()
        self._totals = self._totals.merge([stats])
        running, waiting = engine.num_requests
        self._gauges = {
            "num_requests_running": running,
            "num_requests_waiting": waiting,
            "kv_cache_usage_perc": 1 - engine.num_free_pages / engine.num_pages,
            "weights_version": engine.weights_version,
        }

    def end(self) -> None:
        """The engine is no more: counters stay, and what it is doing is nothing."""
        self._gauges = {}

    def collect(self) -> Iterator[Metric]:
        totals = self._totals
        counters = {
            "generation_tokens": (totals.num_tokens, "Tokens sampled."),
            "num_preemptions": (totals.num_preemptions, "Requests that gave their pages back and began anew."),
            "prefix_cache_queries": (totals.num_prefix_queried, "Tokens of prompts looked up in the prefix cache."),
            "prefix_cache_hits": (totals.num_prefix_hits, "Tokens of prompts found there."),
            "engine_steps": (totals.num_steps, "Forward passes."),
            "engine_graph_steps": (totals.num_replays, "Forward passes that replayed a CUDA graph."),
            "engine_async_steps": (
                totals.num_ahead,
                "Forward passes launched before the last tokens were known.",
            ),
            "engine_step_seconds": (totals.step_seconds, "Time in steps, the model's included."),
            "engine_execute_seconds": (totals.execute_seconds, "Time in the model and the sampler."),
        }
        for name, (value, help) in counters.items():
            counter = CounterMetricFamily(f"vexact:{name}", help, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        for name, value in self._gauges.items():
            gauge = GaugeMetricFamily(
                f"vexact:{name}", name.replace("_", " ").capitalize() + ".", labels=["model_name"]
            )
            gauge.add_metric([self._model], value)
            yield gauge
