"""What `specialised.py` compares and measures, and the rule that its figures make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention.cases import MOONLIGHT, QWEN3, Heads, Packed, Paged, cumulative, to_pages
from vexact.ops.kernels.attention import packed_backward, packed_forward
from vexact.ops.kernels.attention.batch import Batch
from vexact.ops.kernels.attention.launch import WARP_SPECIALISED

D64 = Heads(16, 8, 64, 64)
D256 = Heads(16, 8, 256, 256)
KINDS = (
    (QWEN3, torch.bfloat16), (D64, torch.bfloat16), (Heads(4, 4, 128, 128), torch.float16),
    (MOONLIGHT, torch.bfloat16), (D256, torch.bfloat16),
)  # fmt: skip
PAGE_SIZES = (16, 64, 256, 8, 48)
Pass = Callable[[bool | None], tuple[Tensor, ...]]
SHORT = [1 + 37 * index % 60 for index in range(500)]
MEASURABLE = 0.98  # a ratio below it is slower and not noise


@dataclass(frozen=True, slots=True)
class Job:
    """One batch: packed if page_size is 0, else new tokens over pages."""

    heads: Heads
    q_lens: list[int]
    k_lens: list[int]
    page_size: int = 0

    @property
    def batch(self) -> Batch:
        decoding = int(self.page_size > 0 and 1 in self.q_lens)
        return Batch(sum(self.q_lens), len(self.q_lens), max(self.q_lens), max(self.k_lens), True, decoding)

    @property
    def flops(self) -> float:
        """Of a causal forward: 2 for every column of keys and values of a visible score."""
        scores = sum(q * (k - q / 2) for q, k in zip(self.q_lens, self.k_lens, strict=True))
        return 2.0 * scores * self.heads.queries * (self.heads.dim + self.heads.value_dim)

    @property
    def title(self) -> str:
        lengths = f"{len(self.q_lens):4d} x <= {max(self.q_lens):6d}"
        return f"{lengths} over {max(self.k_lens):6d}, pages {self.page_size:3d}" if self.page_size else lengths


def packed(heads: Heads, lengths: list[int]) -> Job:
    return Job(heads, lengths, lengths)


def prompts(heads: Heads, rows: int, keys: int, count: int, page_size: int, decoding: int = 0) -> Job:
    """Chunks of `rows` new tokens that end at `keys`, beside sequences that decode."""
    return Job(heads, [rows] * count + [1] * decoding, [keys] * (count + decoding), page_size)


PACKED = (
    *(packed(QWEN3, [length] * (16384 // length)) for length in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)),
    packed(QWEN3, [32768]),
    packed(QWEN3, [512] * 2),
    packed(QWEN3, SHORT),
    packed(QWEN3, [8000, *SHORT[:200]]),
    *(packed(D64, [length] * (16384 // length)) for length in (64, 256, 512, 1024, 2048, 8192)),
    packed(D64, [32768]),
    packed(D64, SHORT),
    *(packed(heads, [n] * (16384 // n)) for heads in (MOONLIGHT, D256) for n in (64, 256, 512, 1024, 2048, 8192)),
    *(packed(heads, lengths) for heads in (MOONLIGHT, D256) for lengths in ([32768], SHORT)),
)
PAGED = (
    *(prompts(QWEN3, length, length, 16384 // length, 16) for length in (64, 128, 256, 512, 1024, 2048, 8192)),
    *(prompts(QWEN3, length, length, 16384 // length, 64) for length in (512, 2048, 8192)),
    *(prompts(QWEN3, rows, 8192, 1, size) for rows in (64, 128, 256, 512, 2048) for size in (16, 64)),
    prompts(QWEN3, 2048, 32768, 1, 16),
    *(prompts(QWEN3, rows, 4096, 1, 16, decoding=64) for rows in (128, 512, 2048)),
    *(prompts(heads, rows, keys, 4, 16) for heads in (D64, MOONLIGHT, D256)
      for rows, keys in ((64, 64), (64, 4096), (128, 1024), (256, 256), (512, 4096), (2048, 2048), (2048, 8192))),
)  # fmt: skip
QUICK = (
    packed(QWEN3, [8192] * 2), packed(QWEN3, [1024] * 16), packed(QWEN3, [64] * 256), packed(D64, [8192] * 2),
    prompts(QWEN3, 2048, 8192, 1, 16), prompts(QWEN3, 512, 4096, 1, 16, decoding=64),
)  # fmt: skip


def draw(rows: int, count: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, count, dim, generator=generator, device="cuda", dtype=torch.float32).to(dtype)


def passes(
    heads: Heads, dtype: torch.dtype, q_lens: list[int], k_lens: list[int], causal: bool, seed: int
) -> dict[str, Pass]:
    """Forward and, where there is a specialised one, backward of one batch, by `specialised`."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q = draw(sum(q_lens), heads.queries, heads.dim, dtype, generator)
    k = draw(sum(k_lens), heads.keys, heads.dim, dtype, generator)
    v = draw(sum(k_lens), heads.keys, heads.value_dim, dtype, generator)
    rest = (cumulative(q_lens), cumulative(k_lens), max(q_lens), max(k_lens), heads.dim**-0.5, causal)

    def forward(specialised: bool | None) -> tuple[Tensor, ...]:
        return packed_forward(q, k, v, *rest, specialised=specialised)

    if (2, heads.dim, heads.value_dim) not in WARP_SPECIALISED["backward"]:
        return {"forward": forward}
    dout = draw(sum(q_lens), heads.queries, heads.value_dim, dtype, generator)
    out, lse = forward(False)

    def backward(specialised: bool | None) -> tuple[Tensor, ...]:
        return packed_backward(dout, q, k, v, out, lse, *rest, specialised=specialised)

    return {"forward": forward, "backward": backward}


def paged_pass(
    heads: Heads, dtype: torch.dtype, q_lens: list[int], k_lens: list[int], page_size: int, causal: bool, seed: int
) -> Pass:
    """The forward over shuffled pages; slots without a key are NaN."""
    torch.manual_seed(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    k = draw(sum(k_lens), heads.keys, heads.dim, dtype, generator)
    v = draw(sum(k_lens), heads.keys, heads.value_dim, dtype, generator)
    caches = to_pages(Packed(k, k, v, cumulative(k_lens), k_lens), page_size)
    q = draw(sum(q_lens), heads.queries, heads.dim, dtype, generator)
    used = torch.tensor(k_lens, dtype=torch.int32, device="cuda")
    case = Paged(q, *caches[:2], cumulative(q_lens), used, caches[2], max(q_lens), max(k_lens))
    return lambda specialised: case.run(causal, specialised=specialised)


def least_lines(rows: list[dict]) -> list[str]:
    """Lines of `launch.LEAST_WORK`: for each pass and head dimension the least work of an average tile from which on
    nothing was slower.

    Args:
        rows: figures with "pass", "head_dim", "tile_rows" and "steps" (of `Batch.average_tile`), "triton_tflops" and
            "specialised_tflops".

    >>> figures = {"pass": "paged", "head_dim": 128, "triton_tflops": 100.0}
    >>> short = {**figures, "tile_rows": 64.0, "steps": 1.0, "specialised_tflops": 80.0}
    >>> long = {**figures, "tile_rows": 128.0, "steps": 32.0, "specialised_tflops": 130.0}
    >>> least_lines([short, long])
    ['("paged", 128): 4096,  # 1 of 2 rows, 1.30 to 1.30']
    >>> least_lines([short])
    ['# ("paged", 128): none, slower in 1 rows']
    """
    lines = []
    for kind, dim in dict.fromkeys((row["pass"], row["head_dim"]) for row in rows):
        own = sorted(
            (row["tile_rows"] * row["steps"], row["specialised_tflops"] / row["triton_tflops"])
            for row in rows
            if (row["pass"], row["head_dim"]) == (kind, dim)
        )
        slow = max((work for work, ratio in own if ratio < MEASURABLE), default=0.0)
        taken = [(work, ratio) for work, ratio in own if work > slow]
        if not taken:
            lines.append(f'# ("{kind}", {dim}): none, slower in {sum(ratio < 1 for _, ratio in own)} rows')
            continue
        ratios = [ratio for _, ratio in taken]
        found = f"{len(taken)} of {len(own)} rows, {min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f'("{kind}", {dim}): {taken[0][0]:.4g},  # {found}')
    return lines
