"""One sequence being generated, and the seed that makes its tokens its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from vexact.rollout.requests.stop_strings import StopStringChecker
from vexact.rollout.sampling.prompt_scores import PromptLogprobs
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.rollout.scheduling.block_manager import CachedPage
from vexact.types import DrawSettings

NO_SLOT = -1


def request_seed(seed: int, request_id: str) -> int:
    """Signed 64-bit sampling seed of a request: a hash, so it depends on nothing but these two values."""
    digest = hashlib.blake2b(f"{seed}\0{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def draw_settings(params: SamplingParams, seed: int, request_id: str) -> DrawSettings:
    """How an engine of this seed must draw the tokens of a request (of one sample, where ``params.n`` is not 1)."""
    own = request_seed(seed if params.seed is None else params.seed, request_id)
    return DrawSettings(own, params.temperature, params.top_k, params.top_p, params.min_p)


def id_set(request_ids: Iterable[str]) -> set[str]:
    """Of one id, or of several."""
    return {request_ids} if isinstance(request_ids, str) else set(request_ids)


def requests_of(requests: Iterable[Request], request_ids: Iterable[str] | None, *, by_sample: bool) -> list[Request]:
    """Those of these ids, of their own or, unless ``by_sample``, of what they are samples of; all without ids."""
    if request_ids is None:
        return list(requests)
    asked = id_set(request_ids)
    return [one for one in requests if one.request_id in asked or (not by_sample and one.name in asked)]


@dataclass(slots=True, eq=False)
class Request:
    """Event-level state of a sequence. While it holds a slot, its tokens live in ``SlotState``; the arrays here are
    what it starts from: the prompt, or everything sampled before it was preempted.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]  # stop_token_ids, and the model's eos unless ignored
    token_ids: np.ndarray  # (N,) int64, prompt then sampled
    page_keys: list[bytes]  # chain keys of the full pages hashed so far
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # (N - prompt,) float32
    min_logits: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # (N - prompt,) float32
    route_digests: np.ndarray | None = None  # (N - prompt,) int64 once it was preempted, where there are experts
    stop_checker: StopStringChecker | None = None
    prompt_logprobs: PromptLogprobs | None = None  # shared by the samples of a prompt
    slot: int = NO_SLOT
    pages: list[int] = field(default_factory=list)
    prefix: list[CachedPage] = field(default_factory=list)  # cache entries that stand for pages[: len(prefix)]
    was_preempted: bool = False
    cacheable: bool = True  # False after a key collision: its later pages must not be registered

    @property
    def name(self) -> str:
        """Of what was asked for; with n > 1 this is one of its samples, and has an id of its own."""
        return self.request_id if self.params.n == 1 else self.request_id.rpartition("/")[0]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens when it last waited for a slot."""
        return len(self.token_ids)

    @property
    def max_total_tokens(self) -> int:
        return self.num_prompt_tokens + self.params.max_tokens

    @property
    def parent_entry(self) -> CachedPage | None:
        return self.prefix[-1] if self.prefix else None
