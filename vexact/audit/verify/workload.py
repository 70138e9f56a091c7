"""What verify runs: prompts that cross every edge, mixed sampling, and engine settings drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from vexact.rollout import SamplingParams
from vexact.rollout.engine_config import EngineConfig

_MOST_PER_ROUND = 16  # logits of one round are kept on the device: 16 x 64 tokens x 152 k x 4 bytes are 0.6 GB
_LEAST_ROUNDS = 4  # every round has other engine settings
_EDGES = (16, 32, 64, 128)  # page sizes and key blocks of the CPU and the GPU attention
_GPU_EDGES = (256, 2048)  # and the keys after which the GPU kernels merge partial softmax states
_SENTENCES = (
    "A train leaves the station at nine and reaches the coast, 240 kilometres away, three hours later.",
    "What is 17 times 23? First multiply 17 by 20, then add three times 17 to the result.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n",
    "The river freezes in December, and children skate from one village to the next.",
    "To bake bread you need flour, water, salt and yeast, and above all some patience.",
    "Question: which planet is the largest in the solar system? Answer:",
    "She opened the letter slowly, read the first line, and began to laugh.",
    "If all squares are rectangles and no circle is a rectangle, then no circle is a square.",
)


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that run together, and the engine settings they run under."""

    request_ids: list[str]
    prompts: list[list[int]]
    params: list[SamplingParams]
    engine: dict[str, Any]


def rounds(
    *,
    num_prompts: int,
    max_new_tokens: int,
    max_model_len: int,
    vocab_size: int,
    tokenizer: Any,
    on_gpu: bool,
    seed: int,
) -> Iterator[Round]:
    """Deterministic in its arguments. Raises ValueError when no prompt fits beside ``max_new_tokens``."""
    longest = max_model_len - max_new_tokens
    if longest < 1:
        raise ValueError(
            f"--max_new_tokens={max_new_tokens} leaves no room for a prompt: the model has {max_model_len} positions"
        )
    rng = random.Random(seed)
    size = min(_MOST_PER_ROUND, -(-num_prompts // _LEAST_ROUNDS))
    lengths = _lengths(rng, longest, on_gpu)
    draw = _GpuEngines(rng) if on_gpu else _CpuEngines(rng)
    for start in range(0, num_prompts, size):
        count = min(size, num_prompts - start)
        shared = _tokens(rng, longest, vocab_size, tokenizer)
        prompts = []
        for length in islice(lengths, count):
            kept = shared[: rng.choice([0, length // 2, length - 1])]
            prompts.append(kept + _tokens(rng, length - len(kept), vocab_size, tokenizer))
        yield Round(
            request_ids=[f"verify/{start + index:04d}" for index in range(count)],
            prompts=prompts,
            params=[_params(rng, max_new_tokens) for _ in prompts],
            engine=draw.settings(max(map(len, prompts)) + max_new_tokens, max_model_len),
        )


def _lengths(rng: random.Random, longest: int, on_gpu: bool) -> Iterator[int]:
    """Every length next to an edge, in random order, over and over."""
    edges = (*_EDGES, *_GPU_EDGES) if on_gpu else _EDGES
    lengths = sorted({min(longest, edge + shift) for edge in edges for shift in (-1, 0, 1)} | {1, min(longest, 100)})
    while True:
        yield from rng.sample(lengths, len(lengths))


def _tokens(rng: random.Random, count: int, vocab_size: int, tokenizer: Any) -> list[int]:
    """Tokens of text where there is a tokenizer, else random ids.

    Raises ValueError for a tokenizer that is not this model's.
    """
    if tokenizer is None:
        return [rng.randrange(vocab_size) for _ in range(count)]
    tokens: list[int] = []
    while len(tokens) < count:
        text = " ".join(rng.sample(_SENTENCES, len(_SENTENCES)))
        tokens += tokenizer.encode(text, add_special_tokens=False)
        if not tokens or max(tokens) >= vocab_size:
            raise ValueError(
                f"the tokenizer beside the model gives token ids {tokens[:3]}... for a vocabulary of {vocab_size}; "
                "is it this model's?"
            )
    return tokens[:count]


def _params(rng: random.Random, max_new_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_new_tokens,
        temperature=rng.choice([0.0, 0.6, 1.0, 1.0, 1.3]),
        top_k=rng.choice([-1, -1, 5, 50]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        ignore_eos=True,
    )


class _CpuEngines:
    """Draws engine settings. The tightest have pages for 1.5 of the longest request, so that some are preempted."""

    batch_sizes: tuple[int, ...] = (3, 8, _MOST_PER_ROUND)
    token_budgets: tuple[int, ...] = (37, 64, 250)

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def page_size(self) -> int:
        return self.rng.choice([1, 3, 8, 16, 64])

    def settings(self, longest: int, max_model_len: int) -> dict[str, Any]:
        """For requests of at most ``longest`` tokens."""
        rng, page_size = self.rng, self.page_size()
        chunked = rng.random() < 0.8
        return {
            "page_size": page_size,
            "num_pages": int(-(-longest // page_size) * rng.choice([1.5, 3, 8])),
            "max_model_len": min(longest, max_model_len),
            "max_num_seqs": rng.choice(self.batch_sizes),
            "max_num_batched_tokens": rng.choice(self.token_budgets) if chunked else max(longest, 512),
            "enable_chunked_prefill": chunked,
            "enable_prefix_caching": rng.random() < 0.75,
            "seed": rng.randrange(1 << 30),
            "async_scheduling": rng.random() < 0.75,
        }


class _GpuEngines(_CpuEngines):
    """The same for a GPU, where a page size costs half a minute of compilation and a step 20 ms, however small it is.

    Rounds take turns between the default page size and one other of this seed, and steps are not made tiny.
    """

    batch_sizes = (7, _MOST_PER_ROUND, _MOST_PER_ROUND)
    token_budgets = (99, 250, 1000)

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._page_sizes = cycle([EngineConfig().page_size, rng.choice([1, 3, 8, 16])])

    def page_size(self) -> int:
        return next(self._page_sizes)
