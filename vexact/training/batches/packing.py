"""Which sequences share a micro-batch: a token budget instead of a sequence count, and no padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

BUDGET_KEY = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
NODE = 8  # GPUs: where the number that computes must not show, 1, 2, 4 and 8 of them have whole rounds


def pack(
    lengths: Sequence[int],
    budget: int,
    *,
    balance: bool = False,
    ranks: int | None = None,
    names: Sequence[str] | None = None,
    key: str = BUDGET_KEY,
) -> list[list[int]]:
    """Groups indices of ``lengths`` so that every group has at most ``budget`` tokens; deterministic.

    ``balance=False`` fills groups in order. ``balance=True`` evens out their sizes (longest first into the emptiest
    group), which lowers the peak memory, and makes whole rounds, in each of which ranks wait for each other: the number
    of groups is a multiple of ``ranks``, and groups that take equally long follow each other, the longest first.
    Without ``ranks`` it is a multiple of 8, below 8 a power of two, so that gradients need not know who computes them.

    Raises ValueError naming a sequence longer than the budget, and ``key``.

    >>> pack([3, 3, 3, 3], budget=7)
    [[0, 1], [2, 3]]
    >>> pack([6, 1, 1, 4], budget=7, balance=True)
    [[0], [1, 2, 3]]
    >>> pack([2, 3, 3, 3, 3], budget=7, balance=True)  # three groups would do
    [[0, 1], [2], [3], [4]]
    """
    for index, length in enumerate(lengths):
        if length > budget:
            name = names[index] if names is not None else f"sequence {index}"
            raise ValueError(f"{name} has {length} tokens, more than {key}={budget}; raise {key} to at least {length}")
    return _balanced(lengths, budget, ranks) if balance else _in_order(lengths, budget)


def idle_share(groups: Sequence[Sequence[int]], lengths: Sequence[int], ranks: int) -> float:
    """Share of the tokens that ``ranks`` could compute in the rounds of these groups, and do not: 0 where all are even.

    >>> idle_share([[0], [1], [2]], [4, 2, 3], ranks=2)
    0.3571428571428571
    """
    sizes = [sum(lengths[i] for i in group) for group in groups]
    room = ranks * sum(max(sizes[start : start + ranks]) for start in range(0, len(sizes), ranks))
    return 1.0 - sum(sizes) / room if room else 0.0


def _in_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    used = budget
    for index, length in enumerate(lengths):
        if used + length > budget:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += length
    return groups


def _balanced(lengths: Sequence[int], budget: int, ranks: int | None) -> list[list[int]]:
    if not lengths:
        return []
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = _whole_rounds(-(-sum(lengths) // budget), ranks)
    while (groups := _even(lengths, longest_first, budget, min(count, len(lengths)))) is None:
        count = _whole_rounds(count + 1 + count // 64, ranks)
    # attention takes longer where the same tokens are of fewer sequences
    return sorted(map(sorted, groups), key=lambda group: (-sum(lengths[i] ** 2 for i in group), group))


def _whole_rounds(count: int, ranks: int | None) -> int:
    """The least number of groups from ``count`` on that gives every rank equally many."""
    if ranks is None and count <= NODE:
        return int(1 << (count - 1).bit_length())
    together = NODE if ranks is None else ranks
    return -(-count // together) * together


def _even(lengths: Sequence[int], longest_first: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """``count`` groups, each sequence in the emptiest one; None if one does not fit there, as then it fits nowhere."""
    groups: list[list[int]] = [[] for _ in range(count)]
    used = [(0, number) for number in range(count)]
    for index in longest_first:
        size, emptiest = used[0]
        if size + lengths[index] > budget:
            return None
        groups[emptiest].append(index)
        heapq.heapreplace(used, (size + lengths[index], emptiest))
    return groups
