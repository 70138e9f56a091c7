"""Counters of an engine between two ``stats()`` calls, and of several engines that worked side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar


class Stats(Protocol):
    """What an engine of any kind counts."""

    def metrics(self) -> dict[str, float]:
        """``rollout/*`` names to values."""
        ...

    def merge(self, others: Sequence[Self]) -> Self:
        """These counters and those of engines that worked at the same time, as if they were one engine's."""
        ...


S = TypeVar("S", bound=Stats)


def merge_stats(replicas: Sequence[S]) -> S:
    """The counters of engines that worked at the same time, as if they were one; one engine's are its own.

    Raises:
        ValueError: no replicas.
    """
    if not replicas:
        raise ValueError("merge_stats() of no replicas")
    return replicas[0].merge(replicas[1:])


@dataclass(slots=True)
class EngineStats:
    """Sums and maxima since the last reset."""

    num_steps: int = 0
    num_tokens: int = 0  # sampled
    step_seconds: float = 0.0
    execute_seconds: float = 0.0  # model forward and sampling, waiting for the device included
    wait_seconds: float = 0.0  # of those, waiting
    num_ahead: int = 0  # steps that were launched before the host had seen the tokens of the step before
    max_used_pages: int = 0
    num_pages: int = 0
    num_preemptions: int = 0
    num_prefix_queried: int = 0
    num_prefix_hits: int = 0
    num_replays: int = 0
    own_attention: bool | None = None  # of a rollout on stock operators: whether attention is none of them
    wall_seconds: float | None = None  # None: one engine, whose steps follow each other

    def metrics(self) -> dict[str, float]:
        """Metric names to values; ratios over nothing are 0."""
        host_seconds = self.step_seconds - self.execute_seconds
        seconds = self.step_seconds if self.wall_seconds is None else self.wall_seconds
        baseline = {} if self.own_attention is None else {"rollout/own_attention": float(self.own_attention)}
        return baseline | {
            "rollout/kv_usage": self.max_used_pages / max(1, self.num_pages),
            "rollout/preemptions": float(self.num_preemptions),
            "rollout/prefix_hit_ratio": self.num_prefix_hits / max(1, self.num_prefix_queried),
            "rollout/decode_tokens_per_s": self.num_tokens / seconds if seconds else 0.0,
            "rollout/host_us_per_step": 1e6 * host_seconds / max(1, self.num_steps),
            "rollout/wait_us_per_step": 1e6 * self.wait_seconds / max(1, self.num_steps),
            "rollout/async_ratio": self.num_ahead / max(1, self.num_steps),
            "rollout/graph_ratio": self.num_replays / max(1, self.num_steps),
            "rollout/num_tokens": float(self.num_tokens),
        }

    def merge(self, others: Sequence[EngineStats]) -> EngineStats:
        """Counters add up, so ratios are those of all steps and prompts together. Pages are those of the engine that
        used the largest share of its own. Tokens per second are all tokens over the time of the engine that took
        longest."""
        replicas = [self, *others]
        fullest = max(replicas, key=lambda one: one.max_used_pages / max(1, one.num_pages))
        return EngineStats(
            num_steps=sum(one.num_steps for one in replicas),
            num_tokens=sum(one.num_tokens for one in replicas),
            step_seconds=sum(one.step_seconds for one in replicas),
            execute_seconds=sum(one.execute_seconds for one in replicas),
            wait_seconds=sum(one.wait_seconds for one in replicas),
            num_ahead=sum(one.num_ahead for one in replicas),
            max_used_pages=fullest.max_used_pages,
            num_pages=fullest.num_pages,
            num_preemptions=sum(one.num_preemptions for one in replicas),
            num_prefix_queried=sum(one.num_prefix_queried for one in replicas),
            num_prefix_hits=sum(one.num_prefix_hits for one in replicas),
            num_replays=sum(one.num_replays for one in replicas),
            own_attention=self.own_attention,
            wall_seconds=max(one.step_seconds if one.wall_seconds is None else one.wall_seconds for one in replicas),
        )


@dataclass(slots=True)
class GenerationStats:
    """What any rollout can count."""

    num_tokens: int = 0  # sampled
    seconds: float = 0.0  # of generation

    def metrics(self) -> dict[str, float]:
        """Metric names to values; a rate over nothing is 0."""
        return {
            "rollout/decode_tokens_per_s": self.num_tokens / self.seconds if self.seconds else 0.0,
            "rollout/num_tokens": float(self.num_tokens),
        }

    def merge(self, others: Sequence[GenerationStats]) -> GenerationStats:
        """All tokens, and the time of the engine that took longest."""
        replicas = [self, *others]
        return GenerationStats(sum(one.num_tokens for one in replicas), max(one.seconds for one in replicas))
