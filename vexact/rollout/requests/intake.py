"""Prompts in, validated requests out: everything that can be wrong with a request is said here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import numpy as np

from vexact.rollout.requests.request import Request, request_seed
from vexact.rollout.requests.stop_strings import StopStringChecker, Tokenizer, special_tokens
from vexact.rollout.sampling.prompt_scores import PromptLogprobs, PromptScorer
from vexact.rollout.sampling.sampling_params import SamplingParams, is_unicode
from vexact.rollout.scheduling.block_manager import BlockManager

T = TypeVar("T")


class Intake:
    """Builds the requests of one engine and keeps their ids unique."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        seed: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
        hash_pages: bool,
        prompt_scorer: PromptScorer,
    ) -> None:
        self._blocks = blocks
        self._seed = seed
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._specials = special_tokens(tokenizer)
        self._hash_pages = hash_pages
        self._prompt_scorer = prompt_scorer
        self._in_use: set[str] = set()
        self.num_named = 0  # prompts that came without an id

    def make(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        request_id: str | None,
        draw_id: str | None = None,
        *,
        claims: bool = True,
    ) -> list[Request]:
        """The n requests of one prompt; their ids are taken from now on. ``draw_id``: see ``Engine.add_request``.

        Without ``claims`` no id is taken, and none refused because another has it.

        Raises ValueError for one that could never run; then no id is taken, and the counter stands where it stood.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(
                f"sampling parameters must be a SamplingParams, got {type(params).__name__} {params!r:.80}"
            )
        token_ids = self._prompt_array(prompt)
        name = str(self.num_named) if request_id is None else request_id
        drawn = name if draw_id is None else draw_id
        for what, given in (("request", name), ("draw", drawn)):
            if not isinstance(given, str) or not given or not is_unicode(given):
                raise ValueError(f"{what} id {given!r:.80} must be a non-empty string of Unicode text")
        self._check_fits(name, len(token_ids), params)
        self._check_stops(name, params)
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            self._prompt_scorer.check(name, len(token_ids))
            prompt_logprobs = PromptLogprobs(self._prompt_scorer, token_ids)
        ids = sample_ids(name, params.n)
        used = self._in_use.intersection(ids if claims else ())
        if used:
            raise ValueError(f"request id {sorted(used)[0]!r} is already running; ids must be unique")
        keys: list[bytes] = []
        if self._hash_pages:
            self._blocks.extend_keys(keys, token_ids, (len(token_ids) - 1) // self._blocks.page_size)
        prompt_token_ids = tuple(token_ids.tolist())
        requests = [
            self._request(sample_id, draw, prompt_token_ids, token_ids, params, list(keys), prompt_logprobs)
            for sample_id, draw in zip(ids, sample_ids(drawn, params.n))
        ]
        if claims:
            self._in_use.update(ids)
            self.num_named += request_id is None
        return requests

    def _request(
        self,
        request_id: str,
        draw_id: str,
        prompt_token_ids: tuple[int, ...],
        token_ids: np.ndarray,
        params: SamplingParams,
        page_keys: list[bytes],
        prompt_logprobs: PromptLogprobs | None,
    ) -> Request:
        stop_token_ids = tuple(params.stop_token_ids or ())
        checker = None
        if params.stop:
            assert self._tokenizer is not None
            checker = StopStringChecker(self._tokenizer, tuple(params.stop), self._specials)
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            seed=request_seed(self._seed if params.seed is None else params.seed, draw_id),
            stop_ids=stop_token_ids if params.ignore_eos else stop_token_ids + self._eos_token_ids,
            token_ids=token_ids,
            page_keys=page_keys,
            stop_checker=checker,
            prompt_logprobs=prompt_logprobs,
        )

    @contextmanager
    def names_taken_back(self) -> Iterator[None]:
        """If an error ends it: later prompts then get the names, and so the draws, that these would have had."""
        before = self.num_named
        try:
            yield
        except BaseException:
            self.num_named = before
            raise

    def forget(self, *requests: Request) -> None:
        """Their ids may be used again."""
        self._in_use.difference_update(request.request_id for request in requests)

    def _prompt_array(self, prompt: Sequence[int]) -> np.ndarray:
        try:
            token_ids = np.asarray(prompt)
        except ValueError:
            raise ValueError(f"a prompt must be one flat list of token ids, got {prompt!r:.80}") from None
        if isinstance(prompt, str | bytes):
            raise ValueError(f"a prompt must be a list of token ids, got {prompt!r:.80}; tokenise the text first")
        if token_ids.ndim != 1 or token_ids.size == 0:
            raise ValueError(f"a prompt must be a non-empty list of token ids, got shape {token_ids.shape}")
        if token_ids.dtype.kind in "iu":
            lowest, highest = int(token_ids.min()), int(token_ids.max())
        elif all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):  # too large for an array
            lowest, highest = min(prompt), max(prompt)
        else:
            raise ValueError(f"a prompt must hold integers, got {token_ids.dtype}; tokenise the text first")
        if lowest < 0 or highest >= self._vocab_size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(
                f"prompt token id {bad!s:.40} is outside the vocabulary of {self._vocab_size}; is the tokenizer this "
                "model's?"
            )
        return token_ids.astype(np.int64)

    def _check_stops(self, request_id: str, params: SamplingParams) -> None:
        if params.stop and self._tokenizer is None:
            raise ValueError(f"request {request_id!r}: stop={params.stop!r} needs an engine with a tokenizer")
        outside = [index for index in params.stop_token_ids or () if index >= self._vocab_size]
        if outside:
            raise ValueError(
                f"request {request_id!r}: stop_token_ids holds {outside[0]}, which is never sampled: the model's "
                f"vocabulary has the ids 0 to {self._vocab_size - 1}"
            )

    def _check_fits(self, request_id: str, num_prompt: int, params: SamplingParams) -> None:
        total = num_prompt + params.max_tokens
        if total > self._max_model_len:
            raise ValueError(
                f"request {request_id!r}: {num_prompt} prompt tokens + max_tokens={params.max_tokens} = {total} exceed "
                f"max_model_len={self._max_model_len}; shorten the prompt, lower max_tokens or raise max_model_len"
            )
        needed = self._blocks.pages_for(total - 1)  # the last sampled token is never fed back
        if needed > self._blocks.num_pages:
            raise ValueError(
                f"request {request_id!r}: {num_prompt} prompt tokens + max_tokens={params.max_tokens} need {needed} KV "
                f"pages of {self._blocks.page_size} tokens but the engine has {self._blocks.num_pages}; raise "
                "num_pages (or kv_cache_bytes, or gpu_memory_utilization), or lower max_tokens"
            )


def sample_ids(name: str, n: int) -> list[str]:
    """The ids of the n samples of a request."""
    return [name] if n == 1 else [f"{name}/{index}" for index in range(n)]


def expand(name: str, value: T | Sequence[T], count: int) -> list[T]:
    """One value per prompt: a list or tuple is checked for length, anything else is repeated."""
    if not isinstance(value, list | tuple):
        return [cast(T, value)] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts; give one per prompt")
    return list(value)
