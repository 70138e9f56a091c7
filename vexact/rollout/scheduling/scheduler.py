"""Which sequences compute how many tokens in the next step, and who has to give pages back."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from vexact.rollout.requests.request import NO_SLOT, Request
from vexact.rollout.scheduling.block_manager import BlockManager, CachedPage, page_tokens
from vexact.rollout.scheduling.state import SlotState


class Schedule(NamedTuple):
    """One step's work: decodes first, then prefill chunks, each in admission order."""

    slots: np.ndarray  # (B,) int64
    num_new: np.ndarray  # (B,) int64, at least 1

    @property
    def num_tokens(self) -> int:
        return int(self.num_new.sum())


class Scheduler:
    """First come, first served continuous batching with chunked prefill and preemption by recomputation.

    Why it cannot deadlock: pages are granted in admission order and the last admitted request is the one preempted, so
    the first admitted always advances; when nothing runs, the head of the queue finds every page available, and a
    request that needs more than all pages was refused before it got here.
    """

    def __init__(
        self,
        state: SlotState,
        blocks: BlockManager,
        *,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool,
        enable_prefix_caching: bool,
    ) -> None:
        self._state = state
        self._blocks = blocks
        self._max_num_batched_tokens = max_num_batched_tokens
        self._chunked = enable_chunked_prefill
        self._caching = enable_prefix_caching
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # admission order
        self._running_slots: np.ndarray | None = None  # slots of _running; None after a change
        self.num_preemptions = 0
        self.num_prefix_queried = 0
        self.num_prefix_hits = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def unfinished(self) -> list[Request]:
        """In admission order, then those that wait."""
        return [*self._running, *self._waiting]

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def withdraw(self, requests: Collection[Request]) -> None:
        """Take back requests that wait for their first step, whether they were added or not."""
        self._waiting = deque(request for request in self._waiting if request not in requests)

    def schedule(self, *, may_preempt: bool = True) -> Schedule | None:
        """Grant pages to running requests, split the token budget, then admit. Changes nothing but page ownership.

        Without ``may_preempt`` None if a running request would have to give its pages back: those with a token on its
        way cannot, and the tokens that come may make it needless.
        """
        slots = self._unfilled()
        short = self._short_of_pages(slots)
        preempts = len(short) > self._blocks.num_available
        if preempts and not may_preempt:
            return None
        self._grow_all(short)
        running = self._take_budget(self._unfilled() if preempts else slots)
        if preempts or not self._waiting or not self._state.num_free_slots or not self._has_spare_page():
            return running
        return self._admit(running)

    def _slots(self) -> np.ndarray:
        if self._running_slots is None:
            self._running_slots = np.array([request.slot for request in self._running], np.int64)
        return self._running_slots

    def _unfilled(self) -> np.ndarray:
        """Slots of the running requests but for those whose last token is on its way."""
        slots = self._slots()
        unfilled = self._state.num_tokens[slots] < self._state.max_total_tokens[slots]
        return slots if unfilled.all() else slots[unfilled]

    def _short_of_pages(self, slots: np.ndarray) -> np.ndarray:
        """Of ``slots`` those that lack a page for their last token."""
        state = self._state
        return slots[state.num_pages[slots] * state.page_size < state.num_tokens[slots]]

    def _grow_all(self, short: np.ndarray) -> None:
        for slot in short.tolist():
            request = self._state.requests[slot]
            if request is None:  # preempted for one of its elders a moment ago
                break
            self._grow(request)

    def _grow(self, request: Request) -> None:
        while self._blocks.num_available == 0:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return
        self._state.append_page(request.slot, self._blocks.allocate())

    def _preempt(self, request: Request) -> None:
        assert not self._state.num_pending[request.slot], "a token on its way would be lost"
        self._drop(request)
        request.was_preempted = True
        self._waiting.appendleft(request)
        self.num_preemptions += 1

    def release(self, request: Request) -> None:
        """Take a finished or aborted request out, wherever it is."""
        if request.slot >= 0:
            self._drop(request)
        else:
            self._waiting.remove(request)

    def _drop(self, request: Request) -> None:
        self._state.unbind(request)
        self._blocks.release(request.pages)
        request.pages.clear()
        request.prefix.clear()
        self._running.remove(request)
        self._running_slots = None

    def _take_budget(self, slots: np.ndarray) -> Schedule:
        """Split the token budget over the running requests: those with one token left (decodes) come first."""
        remaining = self._state.num_tokens[slots] - self._state.num_computed[slots]
        if slots.size <= self._max_num_batched_tokens and remaining.sum() == slots.size:
            return Schedule(slots, remaining)
        order = np.argsort(remaining > 1, kind="stable")
        slots, remaining = slots[order], remaining[order]
        left = self._max_num_batched_tokens - (np.cumsum(remaining) - remaining)
        num_new = np.clip(left, 0, remaining)
        if not self._chunked:
            num_new[num_new < remaining] = 0
        some = num_new > 0
        return Schedule(slots[some], num_new[some])

    def _admit(self, running: Schedule) -> Schedule:
        """Admit waiting requests in order while slots, pages and budget last.

        A request whose next missing prefix page is being computed in this very step is passed over: one step later the
        page is a cache hit. It keeps its place and its claim on a slot.
        """
        budget = self._max_num_batched_tokens - running.num_tokens
        in_progress = self._keys_in_progress(running)
        deferred: list[Request] = []
        admitted: list[tuple[int, int]] = []
        while self._waiting and budget > 0 and self._state.num_free_slots > len(deferred) and self._has_spare_page():
            request = self._waiting[0]
            prefix = self._match(request)
            if self._next_key(request, len(prefix)) in in_progress:
                deferred.append(self._waiting.popleft())
                continue
            hit = len(prefix) * self._blocks.page_size
            num_new = min(budget, request.num_tokens - hit)
            if not self._fits(request, prefix) or (not self._chunked and hit + num_new < request.num_tokens):
                break
            self._start(self._waiting.popleft(), prefix)
            in_progress.update(self._chunk_keys(request, hit, hit + num_new))
            admitted.append((request.slot, num_new))
            budget -= num_new
        self._waiting.extendleft(reversed(deferred))
        if not admitted:
            return running
        new = np.array(admitted, np.int64)
        return Schedule(np.concatenate([running.slots, new[:, 0]]), np.concatenate([running.num_new, new[:, 1]]))

    def _match(self, request: Request) -> list[CachedPage]:
        """Longest cached prefix in full pages that leaves at least one token to compute."""
        if not self._caching:
            return []
        page_size = self._blocks.page_size
        num_pages = (request.num_tokens - 1) // page_size
        self._blocks.extend_keys(request.page_keys, request.token_ids, num_pages)
        prefix: list[CachedPage] = []
        for index, key in enumerate(request.page_keys[:num_pages]):
            tokens = page_tokens(request.token_ids, index, page_size)
            entry = self._blocks.lookup(key, tokens, prefix[-1] if prefix else None)
            if entry is None:
                break
            prefix.append(entry)
        return prefix

    def _next_key(self, request: Request, index: int) -> bytes | None:
        """Key of the first page it would have to compute itself although it could be shared."""
        if not self._caching or index >= (request.num_tokens - 1) // self._blocks.page_size:
            return None
        return request.page_keys[index]

    def _chunk_keys(self, request: Request, start: int, stop: int) -> list[bytes]:
        """Keys of the pages that become full when tokens ``start .. stop - 1`` are computed."""
        if not request.cacheable:
            return []
        page_size = self._blocks.page_size
        return request.page_keys[start // page_size : stop // page_size]

    def _keys_in_progress(self, running: Schedule) -> set[bytes]:
        """Keys of the pages that the running requests fill in this step."""
        keys: set[bytes] = set()
        if not self._caching:
            return keys
        start = self._state.num_computed[running.slots]
        stop = start + running.num_new
        filling = start // self._state.page_size != stop // self._state.page_size
        for slot, first, last in zip(*(array[filling].tolist() for array in (running.slots, start, stop))):
            keys.update(self._chunk_keys(self._state.request(slot), first, last))
        return keys

    def _has_spare_page(self) -> bool:
        """Whether ``_fits`` could be true of any request: the last known token of each is in a page of its own. Asked
        first, because looking a long prompt up takes longer than the rest of a step's schedule."""
        return self._blocks.num_available > len(self._running)

    def _fits(self, request: Request, prefix: list[CachedPage]) -> bool:
        """Whether all its known tokens get pages now, and every running request could still cross a page edge."""
        missing = self._blocks.pages_for(request.num_tokens) - len(prefix)
        revived = sum(not self._blocks.is_used(entry.page) for entry in prefix)
        return self._blocks.num_available - revived - missing >= len(self._running)

    def _start(self, request: Request, prefix: list[CachedPage]) -> None:
        request.pages = [self._blocks.acquire(entry) for entry in prefix]
        missing = self._blocks.pages_for(request.num_tokens) - len(prefix)
        request.pages += [self._blocks.allocate() for _ in range(missing)]
        request.prefix = prefix
        self._state.bind(request, num_computed=len(prefix) * self._blocks.page_size)
        self._running.append(request)
        self._running_slots = None
        if not request.was_preempted:  # it would find itself
            self.num_prefix_queried += request.num_tokens
            self.num_prefix_hits += len(prefix) * self._blocks.page_size

    def commit(self, schedule: Schedule, sampled_slots: np.ndarray) -> list[Request]:
        """The step is launched: for every later one its tokens are in the cache, and each of ``sampled_slots`` gets a
        token. Returns the requests that have filled a page, for ``share``."""
        state = self._state
        before = state.num_computed[schedule.slots]
        after = before + schedule.num_new
        state.num_computed[schedule.slots] = after
        state.expect_sampled(sampled_slots)
        if not self._caching:
            return []
        crossed = before // state.page_size != after // state.page_size
        return [state.request(slot) for slot in schedule.slots[crossed].tolist()]

    def share(self, requests: Iterable[Request]) -> None:
        """Let others find the full pages of those that still run, as far as their tokens are known."""
        state = self._state
        for request in requests:
            if request.slot != NO_SLOT:
                num_tokens = min(state.num_computed[request.slot], state.num_known(request.slot))
                self._register(request, int(num_tokens) // state.page_size)

    def _register(self, request: Request, num_full_pages: int) -> None:
        token_ids = self._state.token_ids[request.slot]
        self._blocks.extend_keys(request.page_keys, token_ids, num_full_pages)
        while request.cacheable and len(request.prefix) < num_full_pages:
            index = len(request.prefix)
            tokens = page_tokens(token_ids, index, self._blocks.page_size)
            entry = self._blocks.register(request.pages[index], request.page_keys[index], tokens, request.parent_entry)
            if entry is None:
                request.cacheable = False
            else:
                request.prefix.append(entry)

    def take_counters(self) -> tuple[int, int, int]:
        """Preemptions, and tokens of prompts looked up and found in the prefix cache, since the last call."""
        counters = self.num_preemptions, self.num_prefix_queried, self.num_prefix_hits
        self.num_preemptions = self.num_prefix_queried = self.num_prefix_hits = 0
        return counters
