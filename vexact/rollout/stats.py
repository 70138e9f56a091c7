"""Counters of the engine between two ``stats()`` calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Sums and maxima since the last reset."""

    num_steps: int = 0
    num_tokens: int = 0  # sampled
    step_seconds: float = 0.0
    execute_seconds: float = 0.0  # model forward and sampling, waiting for the device included
    max_used_pages: int = 0

    def record(self, *, num_tokens: int, step_seconds: float, execute_seconds: float) -> None:
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.step_seconds += step_seconds
        self.execute_seconds += execute_seconds

    def metrics(
        self,
        *,
        num_pages: int,
        num_preemptions: int,
        num_prefix_queried: int,
        num_prefix_hits: int,
        num_replays: int,
    ) -> dict[str, float]:
        """Metric names to values; ratios over nothing are 0."""
        host_seconds = self.step_seconds - self.execute_seconds
        return {
            "rollout/kv_usage": self.max_used_pages / num_pages,
            "rollout/preemptions": float(num_preemptions),
            "rollout/prefix_hit_ratio": num_prefix_hits / max(1, num_prefix_queried),
            "rollout/decode_tokens_per_s": self.num_tokens / self.step_seconds if self.step_seconds else 0.0,
            "rollout/host_us_per_step": 1e6 * host_seconds / max(1, self.num_steps),
            "rollout/graph_ratio": num_replays / max(1, self.num_steps),
            "rollout/num_tokens": float(self.num_tokens),
        }
