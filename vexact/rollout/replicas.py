"""Which replica of the engine generates which prompts. Tokens depend on request ids alone, so any split is right."""

from __future__ import annotations

from collections.abc import Sequence


def split_prompts(
    prompt_lengths: Sequence[int],
    n: int | Sequence[int],
    free_pages: Sequence[int],
    mean_response_length: float,
) -> list[list[int]]:
    """Prompts by replica, balanced for equal finishing times.

    All n samples of a prompt go to one replica, which computes and holds the prompt once. A prompt's load is what it
    makes a replica process and hold: its own tokens once, and n responses of the length that responses had of late.
    Longest first, each prompt goes where the load per free page stays lowest (Graham's LPT rule, 1969; among equals to
    the first replica), and to a replica without any prompt while there is one. A pure function of its arguments.

    Args:
        prompt_lengths: tokens of each prompt.
        n: samples of every prompt, or of each.
        free_pages: KV pages that each replica can fill; one without any gets nothing while others have some.
        mean_response_length: tokens; e.g. of the last step, or half of the most that are allowed.

    Returns:
        Per replica, ascending indices of its prompts; empty only if there are too few prompts, or it has no page.

    Raises:
        ValueError: no replica with a free page, negative numbers, or an ``n`` for another number of prompts.

    >>> split_prompts([8, 8, 8, 100], 2, [64, 64], 16.0)
    [[3], [0, 1, 2]]
    """
    counts = [n] * len(prompt_lengths) if isinstance(n, int) else list(n)
    if len(counts) != len(prompt_lengths):
        raise ValueError(f"n has {len(counts)} entries for {len(prompt_lengths)} prompts; give one per prompt")
    if not any(pages > 0 for pages in free_pages) or min(free_pages) < 0:
        raise ValueError(
            f"free_pages={list(free_pages)!r} must hold a positive number for one replica at least, and none below 0"
        )
    if not mean_response_length >= 0:
        raise ValueError(f"mean_response_length={mean_response_length!r} must be at least 0")
    loads = [length + count * mean_response_length for length, count in zip(prompt_lengths, counts)]
    order = sorted(range(len(loads)), key=lambda index: (-loads[index], index))
    usable = [replica for replica, pages in enumerate(free_pages) if pages]
    shares: list[list[int]] = [[] for _ in free_pages]
    totals = [0.0] * len(free_pages)
    for index in order:
        empty = [replica for replica in usable if not shares[replica]]
        # the largest loads of all go to different replicas, the very largest to the one with the most memory
        chosen = min(empty or usable, key=lambda replica: (totals[replica] + loads[index]) / free_pages[replica])
        shares[chosen].append(index)
        totals[chosen] += loads[index]
    return [sorted(share) for share in shares]
