"""Everything the decode loop touches, as numpy arrays indexed by slot, so that a step has no per-sequence Python."""

from __future__ import annotations

import numpy as np

from vexact.rollout.requests.request import NO_SLOT, Request

NO_PAGE = -1
NO_TOKEN = -1


class SlotState:
    """Token, page and sampling state of the running requests; row ``slot`` belongs to one request.

    A step may be launched before the host has seen the tokens of the step before. They count as sampled from the
    moment their step is launched (``expect_sampled``); ``num_pending`` of them have no value yet (``append_sampled``).

    ``logprobs``, ``min_logits`` and ``route_digests`` are indexed by position in the whole sequence, like
    ``token_ids``.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, page_size: int, *, has_routes: bool = False) -> None:
        """``has_routes``: tokens come with a digest of the experts that they chose."""
        slots, length = max_num_seqs, max_model_len
        self.page_size = page_size
        self.token_ids = np.zeros((slots, length), np.int64)
        self.logprobs = np.zeros((slots, length), np.float32)
        self.min_logits = np.zeros((slots, length), np.float32)
        self.route_digests = np.zeros((slots, length), np.int64) if has_routes else None
        self.block_table = np.full((slots, -(-length // page_size)), NO_PAGE, np.int32)
        self.num_tokens = np.zeros(slots, np.int64)  # prompt and sampled, those on their way included
        self.num_pending = np.zeros(slots, np.int64)  # of those, on their way: the last ones
        self.num_computed = np.zeros(slots, np.int64)  # of those, with keys and values in the cache
        self.num_pages = np.zeros(slots, np.int64)
        self.max_total_tokens = np.zeros(slots, np.int64)
        self.temperature = np.zeros(slots, np.float32)
        self.top_k = np.zeros(slots, np.int32)
        self.top_p = np.zeros(slots, np.float32)
        self.min_p = np.zeros(slots, np.float32)
        self.seed = np.zeros(slots, np.int64)
        self.stop_ids = np.full((slots, 1), NO_TOKEN, np.int64)
        self.has_stop_strings = np.zeros(slots, np.bool_)
        self.requests: list[Request | None] = [None] * slots
        self.tenancy = np.zeros(slots, np.int64)  # goes up when a request leaves: tells it from the next in its slot
        self._free_slots = list(range(slots - 1, -1, -1))

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_held_slots(self) -> int:
        return len(self.requests) - len(self._free_slots)

    def request(self, slot: int) -> Request:
        request = self.requests[slot]
        assert request is not None
        return request

    def bind(self, request: Request, num_computed: int) -> None:
        """Give the request a slot and copy its tokens in; ``num_computed`` of them are already in its pages."""
        slot = self._free_slots.pop()
        request.slot = slot
        self.requests[slot] = request
        known, prompt = request.num_tokens, request.num_prompt_tokens
        self.token_ids[slot, :known] = request.token_ids
        self.logprobs[slot, prompt:known] = request.logprobs
        self.min_logits[slot, prompt:known] = request.min_logits
        if self.route_digests is not None and request.route_digests is not None:
            self.route_digests[slot, prompt:known] = request.route_digests
        self.num_tokens[slot] = known
        self.num_pending[slot] = 0
        self.num_computed[slot] = num_computed
        self.max_total_tokens[slot] = request.max_total_tokens
        self.num_pages[slot] = len(request.pages)
        self.block_table[slot, : len(request.pages)] = request.pages
        params = request.params
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = request.seed
        self.has_stop_strings[slot] = request.stop_checker is not None
        self._bind_stop_ids(slot, request.stop_ids)

    def _bind_stop_ids(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self.stop_ids[slot] = NO_TOKEN
        self.stop_ids[slot, : len(stop_ids)] = stop_ids

    def append_page(self, slot: int, page: int) -> None:
        request = self.request(slot)
        self.block_table[slot, len(request.pages)] = page
        request.pages.append(page)
        self.num_pages[slot] = len(request.pages)

    def unbind(self, request: Request) -> None:
        """Take the slot back; the request keeps a copy of everything sampled so far, but of no token on its way."""
        slot, prompt = request.slot, request.num_prompt_tokens
        known = int(self.num_known(slot))
        request.token_ids = self.token_ids[slot, :known].copy()
        request.logprobs = self.logprobs[slot, prompt:known].copy()
        request.min_logits = self.min_logits[slot, prompt:known].copy()
        if self.route_digests is not None:
            request.route_digests = self.route_digests[slot, prompt:known].copy()
        self.block_table[slot] = NO_PAGE
        self.num_pages[slot] = 0
        self.has_stop_strings[slot] = False
        self.requests[slot] = None
        self.tenancy[slot] += 1
        request.slot = NO_SLOT
        self._free_slots.append(slot)

    def num_known(self, slots: np.ndarray | int) -> np.ndarray:
        """Tokens that have a value."""
        return self.num_tokens[slots] - self.num_pending[slots]

    def expect_sampled(self, slots: np.ndarray) -> None:
        """One more token of each of ``slots`` (B,), all distinct, is on its way."""
        self.num_tokens[slots] += 1
        self.num_pending[slots] += 1

    def append_sampled(
        self,
        slots: np.ndarray,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        min_logits: np.ndarray,
        route_digests: np.ndarray | None = None,
    ) -> None:
        """The first token on its way of each slot has arrived. All arguments (B,); slots are distinct."""
        positions = self.num_known(slots)
        self.token_ids[slots, positions] = token_ids
        self.logprobs[slots, positions] = logprobs
        self.min_logits[slots, positions] = min_logits
        if self.route_digests is not None:
            assert route_digests is not None, "every row of a model with experts says which ones it chose"
            self.route_digests[slots, positions] = route_digests
        self.num_pending[slots] -= 1
