"""Who holds which KV page: reference counts, and a cache of full pages keyed by their token prefix."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

ROOT_KEY = b""  # the key before the first page


class BlockError(RuntimeError):
    """A page was freed twice, or taken when none was left: a bug in the engine, never a user mistake."""


class KVIntegrityError(RuntimeError):
    """The idle engine still holds pages or slots; the message is the breakdown."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedPage:
    """A full page whose keys and values are in the cache. ``parent`` is the entry of the page before it.

    Lookups compare ``tokens`` and the identity of ``parent``, so by induction a hit has the same whole prefix: a
    collision of ``key`` costs a miss, never a wrong page.
    """

    key: bytes
    tokens: bytes
    parent: CachedPage | None
    page: int


def chain_key(parent_key: bytes, tokens: bytes) -> bytes:
    """Key of a full page: a hash of its tokens and of everything before them."""
    return hashlib.blake2b(parent_key + tokens, digest_size=16).digest()


def page_tokens(token_ids: np.ndarray, index: int, page_size: int) -> bytes:
    """The tokens of full page ``index`` of a sequence (N,) int64, as bytes."""
    return token_ids[index * page_size : (index + 1) * page_size].tobytes()


class BlockManager:
    """Hands out ``num_pages`` pages.

    A page is *used* (referenced), *cached* (unreferenced but findable) or *free*. Of the cached ones the least recently
    used is evicted first that no other page follows: what follows an evicted page could never be found again.
    """

    def __init__(self, num_pages: int, page_size: int, key_fn: Callable[[bytes, bytes], bytes] = chain_key) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._key_fn = key_fn
        self._refs = [0] * num_pages
        self._entries: list[CachedPage | None] = [None] * num_pages
        self._index: dict[bytes, CachedPage] = {}
        self._followers: dict[int, set[int]] = {}  # pages whose entry has this page's for its parent
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low pages first
        self._unused_cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Pages that can be allocated now, evicting cached ones if need be."""
        return len(self._free) + len(self._unused_cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def is_used(self, page: int) -> bool:
        return self._refs[page] > 0

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def extend_keys(self, keys: list[bytes], token_ids: np.ndarray, num_pages: int) -> None:
        """Append the chain keys of pages ``len(keys) .. num_pages - 1`` of ``token_ids`` (N,) int64."""
        for index in range(len(keys), num_pages):
            parent_key = keys[-1] if keys else ROOT_KEY
            keys.append(self._key_fn(parent_key, page_tokens(token_ids, index, self.page_size)))

    def lookup(self, key: bytes, tokens: bytes, parent: CachedPage | None) -> CachedPage | None:
        entry = self._index.get(key)
        if entry is None or entry.tokens != tokens or entry.parent is not parent:
            return None
        return entry

    def register(self, page: int, key: bytes, tokens: bytes, parent: CachedPage | None) -> CachedPage | None:
        """Make a just computed full page findable.

        Returns the entry that now stands for this prefix (another page's if it was computed twice), or None if the key
        is taken by a different prefix, or the page before it was evicted (which it can be if it is another request's
        copy); the caller then must not register the pages that follow.
        """
        assert self._refs[page] > 0
        assert self._entries[page] is None
        if key in self._index:
            return self.lookup(key, tokens, parent)
        if parent is not None:
            if self._entries[parent.page] is not parent:
                return None
            self._followers.setdefault(parent.page, set()).add(page)
        entry = CachedPage(key, tokens, parent, page)
        self._index[key] = entry
        self._entries[page] = entry
        return entry

    def allocate(self) -> int:
        """Take a page for writing. Raises BlockError if none is left; callers check ``num_available``."""
        if self._free:
            page = self._free.pop()
        elif self._unused_cached:
            page = self._least_recently_used()
            self._forget(page)
            self._free.remove(page)  # at its end: short, since there were none
        else:
            raise BlockError(f"no page left: all {self.num_pages} are referenced")
        self._refs[page] = 1
        return page

    def acquire(self, entry: CachedPage) -> int:
        """Take one more reference on a cached page found by ``lookup``."""
        page = entry.page
        assert self._entries[page] is entry
        if self._refs[page] == 0:
            del self._unused_cached[page]
        self._refs[page] += 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """Give back one reference on each page, last page first so that the tail of a prefix is evicted before it."""
        for page in reversed(list(pages)):
            if self._refs[page] <= 0:
                raise BlockError(f"page {page} was freed twice")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if self._entries[page] is None:
                    self._free.append(page)
                else:
                    self._unused_cached[page] = None

    def clear_cache(self) -> None:
        """Forget every cached page; the weights that computed them are gone."""
        for page in list(self._unused_cached):
            self._free.append(page)
        self._unused_cached.clear()
        self._entries = [None] * self.num_pages
        self._index.clear()
        self._followers.clear()

    def _least_recently_used(self) -> int:
        """Of the cached pages that no other follows; of all, if what follows them is all in use."""
        unfollowed = (page for page in self._unused_cached if page not in self._followers)
        return next(unfollowed, next(iter(self._unused_cached)))

    def _forget(self, page: int) -> None:
        """Its entry, and those of all pages after it, which nothing finds without it. Those not in use become free."""
        entry = self._entries[page]
        assert entry is not None
        if entry.parent is not None:
            siblings = self._followers[entry.parent.page]
            siblings.remove(page)
            if not siblings:
                del self._followers[entry.parent.page]
        forgotten = [page]
        while forgotten:
            page = forgotten.pop()
            forgotten += self._followers.pop(page, ())
            entry = self._entries[page]
            assert entry is not None
            del self._index[entry.key]
            self._entries[page] = None
            if page in self._unused_cached:
                del self._unused_cached[page]
                self._free.append(page)

    def check_idle(self, slots_held: int) -> None:
        """With no request left, every page must be free or cached exactly once. Raises KVIntegrityError."""
        free, cached = len(self._free), len(self._unused_cached)
        referenced = [page for page, refs in enumerate(self._refs) if refs]
        distinct = len({*self._free, *self._unused_cached})
        indexed = len(self._index)
        if free + cached == self.num_pages == distinct and not referenced and not slots_held and indexed == cached:
            return
        raise KVIntegrityError(
            f"idle engine: {free} free + {cached} cached pages ({distinct} distinct, {indexed} indexed) of "
            f"{self.num_pages}; {len(referenced)} still referenced {referenced[:8]}; {slots_held} slots held"
        )
