"""Which requests ended in this step, why, and the sample each one becomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vexact.rollout.requests.request import Request
from vexact.rollout.requests.stop_strings import Tokenizer
from vexact.rollout.scheduling.state import SlotState
from vexact.types import FinishReason, Sample


class Ending(NamedTuple):
    """Why a request ended. ``text`` is set by a stop string only: the text before it."""

    reason: FinishReason
    stop_reason: str | int | None = None
    text: str | None = None


class Finisher:
    """Applies stop conditions to freshly sampled tokens, all slots at once."""

    def __init__(self, state: SlotState, tokenizer: Tokenizer | None) -> None:
        self._state = state
        self._tokenizer = tokenizer

    def endings(self, slots: np.ndarray, token_ids: np.ndarray) -> Iterator[tuple[int, Ending]]:
        """Slots (S,) whose request ended with the token (S,) just appended. A stop token wins over a stop string, and
        both over the length limit."""
        state = self._state
        stopped = (state.stop_ids[slots] == token_ids[:, None]).any(axis=1)
        full = state.num_known(slots) >= state.max_total_tokens[slots]
        candidates = np.flatnonzero(stopped | full | state.has_stop_strings[slots])
        for index in candidates.tolist():
            ending = self._ending(int(slots[index]), int(token_ids[index]), bool(stopped[index]), bool(full[index]))
            if ending is not None:
                yield int(slots[index]), ending

    def _ending(self, slot: int, token_id: int, stopped: bool, full: bool) -> Ending | None:
        if stopped:
            return Ending("stop", token_id)
        checker = self._state.request(slot).stop_checker
        match = checker.push(token_id) if checker is not None else None
        if match is not None:
            return Ending("stop", match.stop, match.text)
        return Ending("length") if full else None

    def sample(self, request: Request, ending: Ending, weights_version: int) -> Sample:
        """The finished request (its slot already given back) as a Sample."""
        token_ids = tuple(request.token_ids[request.num_prompt_tokens :].tolist())
        asked = request.prompt_logprobs
        return Sample(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=token_ids,
            logprobs=request.logprobs,
            min_logits=request.min_logits,
            temperature=float(np.float32(request.params.temperature)),  # the value the sampler divided by
            finish_reason=ending.reason,
            weights_version=weights_version,
            stop_reason=ending.stop_reason,
            text=self._text(token_ids, ending),
            route_digests=request.route_digests,
            prompt_logprobs=None if asked is None or ending.reason == "abort" else asked.values(),
        )

    def _text(self, token_ids: tuple[int, ...], ending: Ending) -> str | None:
        if self._tokenizer is None or ending.text is not None:
            return ending.text
        ended_by_token = isinstance(ending.stop_reason, int)
        shown = token_ids[:-1] if ended_by_token else token_ids
        return self._tokenizer.decode(list(shown), skip_special_tokens=True)
