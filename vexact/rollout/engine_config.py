"""The engine's knobs. None of them may change a sampled token or a bit of a log-probability, except the seed and the
deliberate baselines, ``batch_invariant=False`` and ``mismatch_mode``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real

from vexact.config.checks.seed import check_seed
from vexact.config.sections.engine import EngineSettings
from vexact.rollout.mismatch import check_mismatch

DEFAULT_CPU_KV_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class EngineConfig(EngineSettings):
    """Memory and scheduling limits of one engine: the keys of ``EngineSettings`` and those that follow from others.

    The number of KV pages is ``num_pages`` if given, else ``kv_cache_bytes``, else 256 MiB on CPU or
    ``gpu_memory_utilization`` of the free device memory, and never more than ``max_num_seqs`` full sequences need.

    Raises ``ValueError`` naming the field, its value and the fix.
    """

    seed: int = 0
    mismatch_mode: str = "none"  # see rollout/mismatch.py
    mismatch_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("page_size", "max_num_seqs", "max_num_batched_tokens"):
            self._check_positive(name)
        for name in ("num_pages", "kv_cache_bytes", "max_model_len"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        if self.max_model_len == 1:
            raise ValueError("max_model_len=1 must be at least 2: a token of a prompt and one of its response")
        for item in fields(self):
            if isinstance(item.default, bool) and not isinstance(value := getattr(self, item.name), bool):
                raise ValueError(f"{item.name}={value!r} must be True or False")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization!r} must be in (0, 1]: it is the fraction of the "
                "free device memory given to the KV cache"
            )
        if self.num_pages is not None and self.kv_cache_bytes is not None:
            raise ValueError(
                f"num_pages={self.num_pages} and kv_cache_bytes={self.kv_cache_bytes} both size the KV cache; set one"
            )
        self._check_capture_sizes()
        if self.async_scheduling != "auto" and not isinstance(self.async_scheduling, bool):
            raise ValueError(f"async_scheduling={self.async_scheduling!r} must be 'auto', True or False")
        check_seed("seed", self.seed)
        check_mismatch(self.mismatch_mode, self.mismatch_scale)

    def _check_capture_sizes(self) -> None:
        sizes = self.cudagraph_capture_sizes
        if sizes is not None and (not sizes or any(type(size) is not int or size < 1 for size in sizes)):
            raise ValueError(
                f"cudagraph_capture_sizes={sizes!r} must be positive integers; enforce_eager=True turns graphs off"
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")

    def resolve_async_scheduling(self, device_type: str) -> bool:
        """Whether steps are launched ahead: "auto" where a device works while the host prepares."""
        return device_type == "cuda" if self.async_scheduling == "auto" else self.async_scheduling

    def resolve_model_len(self, max_position_embeddings: int) -> int:
        """Most tokens of a prompt and its response, for a model of so many positions."""
        max_model_len = self.max_model_len or max_position_embeddings
        if max_model_len > max_position_embeddings:
            raise ValueError(
                f"max_model_len={max_model_len} exceeds the model's max_position_embeddings="
                f"{max_position_embeddings}; lower max_model_len"
            )
        self._check_model_len(max_model_len)
        return max_model_len

    def _check_model_len(self, max_model_len: int) -> None:
        """Without chunking every prompt (and every recomputed request) has to fit one forward pass."""
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_model_len={max_model_len} and "
                "enable_chunked_prefill=False; raise max_num_batched_tokens, lower max_model_len or enable chunking"
            )

    def resolve_num_pages(self, *, page_bytes: int, max_model_len: int, free_device_bytes: int | None) -> int:
        """Number of KV pages; ``page_bytes`` covers keys and values of all layers, ``None`` free bytes means CPU."""
        if self.num_pages is not None:
            return self.num_pages
        budget = self.kv_cache_bytes
        if budget is None and free_device_bytes is not None:
            budget = int(free_device_bytes * self.gpu_memory_utilization)
        if budget is None:
            budget = DEFAULT_CPU_KV_CACHE_BYTES
        if budget < page_bytes:
            raise ValueError(
                f"a KV cache of {budget} bytes cannot hold one page of {page_bytes} bytes; raise kv_cache_bytes "
                f"(or gpu_memory_utilization), or lower page_size={self.page_size}"
            )
        most_useful = self.max_num_seqs * -(-max_model_len // self.page_size)
        return min(budget // page_bytes, most_useful)
