"""What generates, as the trainer sees it: one engine, or several that look like one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from vexact.config import Config
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.rollout.stats import Stats
from vexact.types import Sample
from vexact.weights import WeightTaker


class RolloutEngine(Protocol):
    """``Engine`` says what the methods do."""

    @property
    def seed(self) -> int:
        """That requests without one of their own are drawn with."""
        ...

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


class ForeignRollout(RolloutEngine, WeightTaker, Protocol):
    """One engine that is not ours, in the process that it generates in.

    Its log-probabilities are not the trainer's bits: ``trainer.exactness`` is warn or off, and there is no self-test,
    no repeated draw and no diagnosis.
    """

    def take_stats(self) -> Stats:
        """The counters behind ``stats()``, which start anew. They are sent between processes."""
        ...

    def close(self) -> None:
        """Ends what it has started."""
        ...


class RolloutPlugin(Protocol):
    """What an entry point of the group ``vexact.rollouts`` names: a module with these functions, or such an object.

    ``actor_rollout_ref.rollout.name`` is the name of the entry point.
    """

    def check(self, config: Config) -> None:
        """Raises ValueError naming every setting that this rollout cannot honour. Called whenever a configuration is
        read, so it imports nothing heavy."""
        ...

    def build(self, config: Config, tokenizer: Any, device: torch.device) -> ForeignRollout:
        """Loads ``config.model.path``. Raises ValueError, FileNotFoundError: what the user has to fix, named."""
        ...
