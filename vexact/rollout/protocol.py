"""What generates, as the trainer sees it: one engine, or several that look like one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vexact.rollout.engine_config import EngineConfig
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.types import Sample


class RolloutEngine(Protocol):
    """``Engine`` says what the methods do."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def weights_version(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its response."""
        ...

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that the key-value cache of one replica holds."""
        ...

    @property
    def num_replicas(self) -> int: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str],
    ) -> list[Sample]: ...

    def stats(self) -> dict[str, float]: ...

    def clear_prefix_cache(self) -> None: ...

    def release_kv_cache(self) -> None: ...

    def resume_kv_cache(self) -> None: ...
