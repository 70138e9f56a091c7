"""Reference counts, eviction order and collision safety of the KV page manager."""

import random

import numpy as np
import pytest

from vexact.rollout.scheduling.block_manager import BlockError, BlockManager, KVIntegrityError, page_tokens

PAGE = 4


def cache_sequence(blocks, token_ids, pages):
    """Register the full pages of a sequence; returns the entries, None from the first refusal on."""
    keys: list[bytes] = []
    blocks.extend_keys(keys, token_ids, len(pages))
    entries, parent = [], None
    for index, page in enumerate(pages):
        entry = blocks.register(page, keys[index], page_tokens(token_ids, index, PAGE), parent)
        entries.append(entry)
        if entry is None:
            break
        parent = entry
    return entries


def find(blocks, token_ids):
    """Pages of the longest cached prefix."""
    keys: list[bytes] = []
    num_pages = len(token_ids) // PAGE
    blocks.extend_keys(keys, token_ids, num_pages)
    found, parent = [], None
    for index in range(num_pages):
        entry = blocks.lookup(keys[index], page_tokens(token_ids, index, PAGE), parent)
        if entry is None:
            break
        found.append(entry)
        parent = entry
    return found


def test_a_shared_page_returns_only_with_its_last_reference():
    blocks = BlockManager(3, PAGE)
    tokens = np.arange(PAGE)
    page = blocks.allocate()
    (entry,) = cache_sequence(blocks, tokens, [page])
    assert blocks.acquire(entry) == page
    blocks.release([page])
    assert blocks.num_used == 1
    assert blocks.num_available == 2
    blocks.release([page])
    assert blocks.num_used == 0
    assert find(blocks, tokens) == [entry]
    blocks.check_idle(0)


def test_freeing_twice_raises():
    blocks = BlockManager(2, PAGE)
    page = blocks.allocate()
    blocks.release([page])
    with pytest.raises(BlockError, match=f"page {page} was freed twice"):
        blocks.release([page])


def test_allocating_without_pages_raises():
    blocks = BlockManager(1, PAGE)
    blocks.allocate()
    with pytest.raises(BlockError, match="all 1 are referenced"):
        blocks.allocate()


def test_least_recently_used_page_is_evicted_and_the_tail_before_its_prefix():
    blocks = BlockManager(4, PAGE)
    old, new = np.arange(8), np.arange(100, 108)
    old_pages, new_pages = [blocks.allocate(), blocks.allocate()], [blocks.allocate(), blocks.allocate()]
    cache_sequence(blocks, old, old_pages)
    cache_sequence(blocks, new, new_pages)
    blocks.release(old_pages)
    blocks.release(new_pages)
    assert blocks.allocate() == old_pages[1]
    assert len(find(blocks, old)) == 1
    assert len(find(blocks, new)) == 2
    revived = blocks.acquire(find(blocks, old)[0])  # used again: now the newest
    blocks.release([revived])
    assert blocks.allocate() == new_pages[1]
    assert len(find(blocks, old)) == 1


def test_a_prefix_matters_not_only_the_page():
    blocks = BlockManager(4, PAGE)
    cache_sequence(blocks, np.array([1, 1, 1, 1, 7, 7, 7, 7]), [blocks.allocate(), blocks.allocate()])
    assert len(find(blocks, np.array([1, 1, 1, 1, 7, 7, 7, 7]))) == 2
    assert len(find(blocks, np.array([2, 2, 2, 2, 7, 7, 7, 7]))) == 0
    assert len(find(blocks, np.array([7, 7, 7, 7]))) == 0


def test_a_key_collision_is_a_miss_never_a_wrong_page():
    """Every key of page i is equal, and the second pages even hold the same tokens."""
    blocks = BlockManager(8, PAGE, key_fn=lambda parent, tokens: parent + b"x")
    first = np.array([1, 1, 1, 1, 7, 7, 7, 7])
    second = np.array([2, 2, 2, 2, 7, 7, 7, 7])
    entries = cache_sequence(blocks, first, [blocks.allocate(), blocks.allocate()])
    refused = cache_sequence(blocks, second, [blocks.allocate(), blocks.allocate()])
    assert refused == [None]
    assert find(blocks, second) == []
    assert find(blocks, first) == entries


def test_a_collision_after_the_parent_was_evicted_is_a_miss_too():
    """The child of an evicted page must not be reached through another page that took the parent's key."""
    blocks = BlockManager(2, PAGE, key_fn=lambda parent, tokens: parent + b"x")
    first = np.array([1, 1, 1, 1, 7, 7, 7, 7])
    second = np.array([2, 2, 2, 2, 7, 7, 7, 7])
    parent, child = blocks.allocate(), blocks.allocate()
    cache_sequence(blocks, first, [parent, child])
    blocks.release([parent])
    assert blocks.allocate() == parent  # evicts the parent's entry only
    cache_sequence(blocks, second[:PAGE], [parent])
    assert [entry.page for entry in find(blocks, second)] == [parent]


def test_the_same_prefix_computed_twice_has_one_entry():
    blocks = BlockManager(4, PAGE)
    tokens = np.arange(PAGE)
    first, second = blocks.allocate(), blocks.allocate()
    (entry,) = cache_sequence(blocks, tokens, [first])
    assert cache_sequence(blocks, tokens, [second]) == [entry]
    blocks.release([first, second])
    blocks.check_idle(0)
    assert find(blocks, tokens) == [entry]


def test_clearing_forgets_everything():
    blocks = BlockManager(3, PAGE)
    tokens = np.arange(PAGE)
    page = blocks.allocate()
    cache_sequence(blocks, tokens, [page])
    blocks.release([page])
    blocks.clear_cache()
    assert find(blocks, tokens) == []
    blocks.check_idle(0)


@pytest.mark.parametrize("slots_held", [0, 1])
def test_the_idle_check_names_what_is_held(slots_held):
    blocks = BlockManager(3, PAGE)
    if not slots_held:
        blocks.allocate()
    with pytest.raises(KVIntegrityError, match=f"{slots_held} slots held") as error:
        blocks.check_idle(slots_held)
    assert "of 3" in str(error.value)


def test_random_traffic_never_loses_a_page():
    rng = random.Random(0)
    blocks = BlockManager(12, PAGE)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            blocks.release(held.pop(rng.randrange(len(held))))
            continue
        tokens = np.array([rng.randrange(2) for _ in range(PAGE)]).repeat(rng.randint(1, 3))
        prefix = find(blocks, tokens)
        pages = [blocks.acquire(entry) for entry in prefix]
        if blocks.num_available < len(tokens) // PAGE - len(prefix):
            blocks.release(pages)
            continue
        fresh = [blocks.allocate() for _ in range(len(tokens) // PAGE - len(prefix))]
        assert not set(fresh) & {page for other in [*held, pages] for page in other}
        keys: list[bytes] = []
        blocks.extend_keys(keys, tokens, len(tokens) // PAGE)
        parent = prefix[-1] if prefix else None
        for index, page in enumerate(fresh, start=len(prefix)):
            parent = blocks.register(page, keys[index], page_tokens(tokens, index, PAGE), parent)
            assert parent is not None
        held.append(pages + fresh)
    for pages in held:
        blocks.release(pages)
    blocks.check_idle(0)


def test_a_page_goes_before_the_one_it_follows_although_that_is_older():
    """The second request computed the first page as well, and its own second page hangs on the other's first."""
    blocks = BlockManager(5, PAGE)
    tokens = np.arange(8)
    first = blocks.allocate()
    (entry,) = cache_sequence(blocks, tokens[:PAGE], [first])
    second = [blocks.allocate(), blocks.allocate()]
    assert cache_sequence(blocks, tokens, second)[0] is entry
    blocks.release([first])  # the oldest, and followed
    blocks.release(second)
    other = blocks.allocate()
    cache_sequence(blocks, np.arange(50, 54), [other])
    blocks.release([other])
    free = [blocks.allocate(), blocks.allocate()]
    assert set(free).isdisjoint({first, second[1], other})
    assert len(find(blocks, tokens)) == 2
    assert blocks.allocate() == second[1]
    assert find(blocks, tokens) == [entry]
    assert [blocks.allocate(), blocks.allocate()] == [first, other]


def test_what_follows_an_evicted_page_is_forgotten_with_it():
    """The page after it is in use: it can no longer be found, goes back as a free one, and nothing hangs on it."""
    blocks = BlockManager(4, PAGE)
    tokens = np.arange(12)
    first = blocks.allocate()
    cache_sequence(blocks, tokens[:PAGE], [first])
    second = [blocks.allocate(), blocks.allocate()]
    entries = cache_sequence(blocks, tokens[:8], second)
    blocks.release([first])
    third = blocks.allocate()
    assert blocks.allocate() == first
    assert find(blocks, tokens) == []
    keys: list[bytes] = []
    blocks.extend_keys(keys, tokens, 3)
    assert blocks.register(third, keys[2], page_tokens(tokens, 2, PAGE), entries[1]) is None
    blocks.release([*second, third, first])
    blocks.check_idle(0)
    assert blocks.num_available == 4
    again = [blocks.allocate() for _ in range(3)]
    assert len(cache_sequence(blocks, tokens, again)) == 3
    assert [entry.page for entry in find(blocks, tokens)] == again


def test_eviction_is_that_of_a_plain_model():
    """Random requests over a small alphabet of pages; the model scans all pages for the one that must go."""
    rng = random.Random(3)
    evictions = 0
    for _ in range(60):
        blocks, clock, used_at, running = BlockManager(8, PAGE), 0, {}, []
        for _ in range(60):
            clock += 1
            if running and (rng.random() < 0.5 or len(running) > 2):
                pages = running.pop(rng.randrange(len(running)))
                for page in reversed(pages):
                    clock += 1
                    used_at[page] = clock
                blocks.release(pages)
                continue
            tokens = np.repeat([rng.randrange(2) for _ in range(rng.randint(1, 4))], PAGE)
            found = find(blocks, tokens) if rng.random() < 0.7 else []  # else it is computed again, beside the other
            missing = len(tokens) // PAGE - len(found)
            revived = sum(not blocks.is_used(entry.page) for entry in found)
            if blocks.num_available - revived < missing:
                continue
            pages = [blocks.acquire(entry) for entry in found]
            for _ in range(missing):
                cached = [entry for entry in blocks._entries if entry and not blocks.is_used(entry.page)]
                followed = {entry.parent.page for entry in blocks._entries if entry and entry.parent}
                leaves = [entry for entry in cached if entry.page not in followed] or cached
                had_free = len(cached) < blocks.num_available
                page = blocks.allocate()
                if not had_free:
                    evictions += 1
                    assert page == min(leaves, key=lambda entry: used_at[entry.page]).page
                pages.append(page)
            keys, parent = [], found[-1] if found else None
            blocks.extend_keys(keys, tokens, len(pages))
            for index in range(len(found), len(pages)):
                parent = blocks.register(pages[index], keys[index], page_tokens(tokens, index, PAGE), parent)
                if parent is None:
                    break
            running.append(pages)
            for entry in blocks._index.values():
                assert entry.parent is None or blocks._entries[entry.parent.page] is entry.parent
        for pages in running:
            blocks.release(pages)
        blocks.check_idle(0)
    assert evictions > 300
