"""Which sequences share a micro-batch: a token budget instead of a sequence count, and no padding."""

from __future__ import annotations

from collections.abc import Sequence

BUDGET_KEY = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"


def pack(
    lengths: Sequence[int],
    budget: int,
    *,
    balance: bool = False,
    names: Sequence[str] | None = None,
    key: str = BUDGET_KEY,
) -> list[list[int]]:
    """Groups indices of ``lengths`` so that every group has at most ``budget`` tokens; deterministic.

    ``balance=False`` fills groups in order. ``balance=True`` evens out their sizes (longest first into the emptiest
    group), which lowers the peak memory.

    Raises ValueError naming a sequence longer than the budget, and ``key``.

    >>> pack([3, 3, 3, 3], budget=7)
    [[0, 1], [2, 3]]
    >>> pack([6, 1, 1, 4], budget=7, balance=True)
    [[0], [1, 2, 3]]
    """
    for index, length in enumerate(lengths):
        if length > budget:
            name = names[index] if names is not None else f"sequence {index}"
            raise ValueError(f"{name} has {length} tokens, more than {key}={budget}; raise {key} to at least {length}")
    return _balanced(lengths, budget) if balance else _in_order(lengths, budget)


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


def _balanced(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first into the emptiest group; a sequence that does not fit there fits nowhere and opens a group."""
    num_groups = -(-sum(lengths) // budget)
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    used = [0] * num_groups
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min(range(len(groups)), key=used.__getitem__)
        if used[emptiest] + lengths[index] > budget:
            groups.append([])
            used.append(0)
            emptiest = len(groups) - 1
        groups[emptiest].append(index)
        used[emptiest] += lengths[index]
    return sorted(sorted(group) for group in groups)
