"""Probes that compute on this machine: are the operators' bits what they promise, here?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vexact.attention import ATTENTION, check_attention
from vexact.audit.doctor.result import CheckResult, error, ok, warning
from vexact.ops import PackedMetadata, PagedMetadata, attention, linear, linear_cross_entropy, token_logprobs

BATCHES = (1, 2, 3, 5, 7, 9, 16, 17, 31, 32, 33, 64, 65, 100, 129)
K, N = 256, 192  # inner and outer size of the probed product; multiples of 16, so that descriptors apply
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)  # across page and key-block edges
PAGE_SIZE = 16
REPORT = "report this machine's versions and GPU; until then set trainer.exactness=warn"
DTYPES = (torch.float32, torch.bfloat16)
_SEED = 0


class Heads(NamedTuple):
    """Query heads, key/value heads, and the widths of a key and of a value."""

    queries: int
    keys: int
    dim: int
    value_dim: int


HEADS = Heads(4, 2, 32, 32)


def check_linear(device: str, dtype: torch.dtype) -> CheckResult:
    """Rows of a product alone and among any number of others."""
    name = f"probe linear {short(dtype)}"
    x, weight = normal((max(BATCHES), K), dtype, device), normal((N, K), dtype, device)
    bad = [m for m in BATCHES if not same(linear(x[:m], weight), linear(x, weight)[:m])]
    if bad:
        return error(name, f"rows change with the number of rows: {some(bad)} of {len(BATCHES)} sizes", REPORT)
    return ok(name, f"rows have the same bits in batches of {BATCHES[0]} to {BATCHES[-1]}")


def check_tiles(device: str, dtype: torch.dtype, tiles: Iterable[object] | None = None) -> CheckResult:
    """On a GPU: every entry of the tile tables gives the same bits."""
    from vexact.ops.kernels.linear import matmul

    name = f"probe tile table {short(dtype)}"
    x, weight = normal((max(BATCHES), K), dtype, device), normal((N, K), dtype, device)
    chosen = list(all_tiles(dtype) if tiles is None else tiles)
    expected = matmul(x, weight, x.new_empty(len(x), N), layout="forward")  # what linear() launches
    bad = []
    for tile in chosen:
        out = torch.empty_like(expected)
        if not same(matmul(x, weight, out, layout="forward", tile=tile), expected):  # type: ignore[arg-type]
            bad.append(tile)
    if bad:
        return error(name, f"{len(bad)} of {len(chosen)} tiles give other bits, the first is {bad[0]}", REPORT)
    return ok(name, f"{len(chosen)} tiles give the same bits")


def all_tiles(dtype: torch.dtype) -> list[object]:
    """Every distinct tile that a product of this type may be launched with."""
    from vexact.ops.kernels.linear.tile_table import TUNED
    from vexact.ops.kernels.linear.tiles import FLOAT32_TILES, POINTER_TILES

    if dtype == torch.float32:
        return [tile for _, tile in FLOAT32_TILES]
    entries = [*POINTER_TILES, *(entry for table in TUNED.values() for entry in table)]
    return list(dict.fromkeys(tile for _, tile in entries))


def check_stock_linear(device: str, dtype: torch.dtype) -> CheckResult:
    """What torch's own product does here; nothing depends on it."""
    x, weight = normal((max(BATCHES), K * 8), dtype, device), normal((N, K * 8), dtype, device)
    whole = F.linear(x, weight)
    bad = [m for m in BATCHES if not same(F.linear(x[:m], weight), whole[:m])]
    text = "is not batch-invariant" if bad else "shows no difference"
    detail = f"{len(bad)} of {len(BATCHES)} batch sizes change its rows"
    return ok(f"stock linear {short(dtype)}", f"torch's own product {text} here: {detail} (not used, for comparison)")


def check_attention_bits(
    device: str, dtype: torch.dtype, heads: Heads = HEADS, title: str = "probe attention"
) -> CheckResult:
    """Packed sequences against pages filled in two pieces."""
    name = f"{title} {short(dtype)}"
    packed, paged = packed_attention(device, dtype, heads), paged_attention(device, dtype, heads)
    different = int((bits(packed) != bits(paged)).flatten(1).any(1).sum())
    if different:
        return error(name, f"{different} of {len(packed)} tokens differ between packed and paged attention", REPORT)
    widths = f"{heads.dim}" if heads.dim == heads.value_dim else f"{heads.dim} (values {heads.value_dim})"
    shape = "" if heads is HEADS else f", {heads.queries} heads over {heads.keys} of {widths}"
    return ok(name, f"{len(packed)} tokens have the same bits packed and through pages{shape}")


def packed_attention(device: str, dtype: torch.dtype, heads: Heads = HEADS) -> Tensor:
    """(T, Hq, Dv) of all sequences in one call."""
    q, k, v = _qkv(device, dtype, heads)
    return attention(q, k, v, PackedMetadata.from_lengths(list(LENGTHS), device), q.shape[-1] ** -0.5)


def paged_attention(device: str, dtype: torch.dtype, heads: Heads = HEADS) -> Tensor:
    """The same tokens: all but the last of each sequence in one call, then the last ones, as decoding does."""
    q, k, v = _qkv(device, dtype, heads)
    pages = [-(-length // PAGE_SIZE) for length in LENGTHS]
    first = [sum(pages[:b]) for b in range(len(LENGTHS))]
    starts = [sum(LENGTHS[:b]) for b in range(len(LENGTHS))]
    cache = tuple(torch.zeros(sum(pages), PAGE_SIZE, *x.shape[1:], dtype=dtype, device=device) for x in (k, v))
    table = torch.full((len(LENGTHS), max(pages)), -1, dtype=torch.int32)
    for b, count in enumerate(pages):
        table[b, :count] = torch.arange(first[b], first[b] + count)
    out = q.new_empty(*q.shape[:2], heads.value_dim)
    for piece in (lambda n: range(0, n - 1), lambda n: range(n - 1, n)):
        chosen = [b for b in range(len(LENGTHS)) if len(piece(LENGTHS[b]))]
        new = [piece(LENGTHS[b]) for b in chosen]
        rows = torch.tensor([starts[b] + i for b, part in zip(chosen, new) for i in part], device=device)
        slots = [first[b] * PAGE_SIZE + i for b, part in zip(chosen, new) for i in part]
        metadata = PagedMetadata(
            cu_seqlens_q=PackedMetadata.from_lengths([len(part) for part in new], device).cu_seqlens,
            seqused_k=torch.tensor([part.stop for part in new], dtype=torch.int32, device=device),
            block_table=table[chosen].to(device),
            slot_mapping=torch.tensor(slots, device=device),
            max_seqlen_q=max(map(len, new)),
            max_seqlen_k=max(part.stop for part in new),
        )
        out[rows] = attention(q[rows], k[rows], v[rows], metadata, q.shape[-1] ** -0.5, (cache[0], cache[1]))
    return out


def check_logprob(
    device: str, dtype: torch.dtype, width: int = 64, vocab_size: int = 1031, title: str = "probe logprob"
) -> CheckResult:
    """The sampler's log-probabilities against the trainer's fused ones, alone and together."""
    name = f"{title} {short(dtype)}"
    hidden, weight = normal((70, width), dtype, device), normal((vocab_size, width), dtype, device)
    tokens = torch.arange(70, device=device) * 13 % vocab_size
    ones, keep_all = torch.full((70,), 1.25, device=device), torch.full((70,), float("-inf"), device=device)
    fused = linear_cross_entropy(hidden, weight, tokens, ones, keep_all).logprobs
    logits = linear(hidden, weight, out_dtype=torch.float32)
    together = token_logprobs(logits, tokens, ones, keep_all).logprobs
    alone = torch.cat(
        [token_logprobs(logits[i : i + 1], tokens[i : i + 1], ones[:1], keep_all[:1]).logprobs for i in range(70)]
    )
    different = int(((bits(fused) != bits(together)) | (bits(alone) != bits(together))).sum())
    if different:
        return error(name, f"{different} of 70 tokens differ between sampler and trainer", REPORT)
    return ok(name, "70 tokens have the same bits in sampler and trainer, alone and together")


def check_attention_impls(exact: bool) -> Iterator[CheckResult]:
    """Which attention implementations can be chosen. ``exact``: what the attention probe found here."""
    for impl, facts in ATTENTION.items():
        name = f"attention {impl}"
        try:
            check_attention(impl, "attn_impl")
        except ValueError as problem:
            yield ok(name, f"absent: {problem}")
            continue
        if not facts.invariant:
            yield ok(name, "available, not exact: a stock kernel, for deliberate baselines")
        elif exact:
            yield ok(name, "exact here")
        else:
            yield warning(name, "available, but the probe found differences here", REPORT)


def _qkv(device: str, dtype: torch.dtype, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((heads.queries, heads.dim), (heads.keys, heads.dim), (heads.keys, heads.value_dim))
    q, k, v = (normal((sum(LENGTHS), *shape), dtype, device, seed) for seed, shape in enumerate(shapes))
    return q, k, v


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = _SEED) -> Tensor:
    """The same normal numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit."""
    return bool(torch.equal(bits(a), bits(b)))


def bits(x: Tensor) -> Tensor:
    """Viewed as whole numbers of the same size."""
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def short(dtype: torch.dtype) -> str:
    """Its short name."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def some(values: Sequence[object]) -> str:
    """The first of them."""
    text = ", ".join(map(str, values[:4]))
    return f"{text}, ..." if len(values) > 4 else text
