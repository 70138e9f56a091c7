"""Every kernel once on small inputs of odd sizes, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python -m benchmarks.kernels.sanitize

Without the caching allocator every tensor is an allocation of its own, so that one element too far is seen. Results
must also be finite. `--processes 16` compiles the kernels first, outside of the sanitizer's slow process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from vexact import ops
from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata
from vexact.ops.kernels import chain
from vexact.ops.kernels.attention import packed_backward, packed_forward, paged_forward
from vexact.ops.kernels.launches import forget
from vexact.ops.kernels.moe import few
from vexact.ops.square_sums import num_stretches, square_sums

BF16, FP32 = torch.bfloat16, torch.float32
Case = tuple[str, Callable[[], list[Tensor]]]  # name, run: returns what must be finite


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def with_gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs and the gradients of their sum."""
    total = sum(out.float().sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


def linear(rows: int, n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias = draw(rows, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, dtype=dtype)
    return with_gradients((ops.linear(x, weight, bias),), (x, weight, bias))


def packed(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    lengths = [70, 0, 1, 129]
    q, k, v = (draw(sum(lengths), count, dim, dtype=dtype) for count in (heads[0], heads[1], heads[1]))
    out = ops.attention(q, k, v, PackedMetadata.from_lengths(lengths, "cuda"), dim**-0.5)
    return with_gradients((out,), (q, k, v))


@torch.no_grad()
def specialised(heads: tuple[int, int], dims: tuple[int, int]) -> list[Tensor]:
    """The warp-specialised kernels, whether they are chosen or not; where there are none, the Triton kernels."""
    lengths, (dim, value_dim) = [70, 0, 1, 129, 2200], dims
    cu = PackedMetadata.from_lengths(lengths, "cuda").cu_seqlens
    shapes = (heads[0], dim), (heads[1], dim), (heads[1], value_dim)
    q, k, v = (draw(sum(lengths), *shape).detach() for shape in shapes)
    rest = (cu, cu, max(lengths), max(lengths), dim**-0.5, True)
    out, lse = packed_forward(q, k, v, *rest, specialised=True)
    return [out, lse, *packed_backward(torch.randn_like(out), q, k, v, out, lse, *rest, specialised=True)]


@torch.no_grad()
def specialised_pages(heads: tuple[int, int], dims: tuple[int, int], page_size: int) -> list[Tensor]:
    """The same over pages: a prompt, chunks of prompts, a sequence that decodes."""
    new, used, (dim, value_dim) = [70, 1, 129, 300], [300, 33, 129, 2200], dims
    table = page_table([-(-keys // page_size) for keys in used])
    caches = (draw(int(table.max()) + 1, page_size, heads[1], width).detach() for width in (dim, value_dim))
    cu = PackedMetadata.from_lengths(new, "cuda").cu_seqlens
    lengths = cu, torch.tensor(used, dtype=torch.int32, device="cuda"), table.cuda()
    q = draw(sum(new), heads[0], dim).detach()
    return list(paged_forward(q, *caches, *lengths, max(new), max(used), dim**-0.5, True, specialised=True))


def page_table(counts: list[int]) -> Tensor:
    """So many pages for each sequence, shuffled; padded by -1."""
    table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    free = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    for row, own in zip(table, free, strict=True):
        row[: len(own)] = own
    return table


@torch.no_grad()
def paged(page_size: int, new: list[int], old: list[int], dim: int) -> list[Tensor]:
    """New tokens behind ``old`` keys; the last token of the batch is padding that no slot takes."""
    used = [a + b for a, b in zip(new, old, strict=True)]
    pages = [-(-keys // page_size) for keys in used]
    table = page_table(pages)
    caches = tuple(torch.zeros(sum(pages), page_size, 2, dim, device="cuda", dtype=BF16) for _ in range(2))
    slots = [
        int(row[p // page_size]) * page_size + p % page_size
        for row, keys, count in zip(table, used, new, strict=True)
        for p in range(keys - count, keys)
    ]
    metadata = PagedMetadata(
        cu_seqlens_q=torch.tensor([0, *new]).cumsum(0).to("cuda", torch.int32),
        seqused_k=torch.tensor(used, dtype=torch.int32, device="cuda"),
        block_table=table.cuda(),
        slot_mapping=torch.tensor([*slots, -1], device="cuda"),
        max_seqlen_q=max(new),
        max_seqlen_k=max(used),
    )
    q, k, v = (draw(sum(new) + 1, heads, dim).detach() for heads in (4, 2, 2))
    results = [ops.attention(q, k, v, metadata, dim**-0.5, caches)[: sum(new)]]
    positions, table = torch.arange(len(q), device="cuda"), torch.randn(len(q), dim, device="cuda")
    for norms in (None, ops.HeadNorms(q[0, 0].clone(), q[0, 1].clone(), 1e-6)):
        rotated = ops.rope_to_cache(q, k, v, norms, positions, table, caches, metadata.slot_mapping)
        results.append(ops.cached_attention(rotated, metadata, dim**-0.5, caches)[: sum(new)])
    return results


def rowwise(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    x, y, weight = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype), draw(width, dtype=dtype)
    results = with_gradients((ops.rms_norm(x, weight, 1e-6),), (x, weight))
    results += with_gradients(ops.add_rms_norm(x, y, weight, 1e-6), (x, y, weight))
    gate_up = draw(rows, 2 * width, dtype=dtype)
    results += with_gradients((ops.swiglu(gate_up),), (gate_up,))
    q, k = draw(rows, 3, 40, dtype=dtype), draw(rows, 1, 40, dtype=dtype)
    table = torch.randn(rows, 40, device="cuda")
    positions, norms = torch.arange(rows, device="cuda"), (draw(40, dtype=dtype), draw(40, dtype=dtype))
    results += with_gradients(ops.rope(q, k, positions, table), (q, k))
    latent = q, q[..., 1:-1], k[:, 0, :2], positions, table[:, :2].contiguous(), True
    results += with_gradients(ops.latent_rope(*latent), (q, k))
    results += with_gradients(ops.qk_norm_rope(q, k, *norms, 1e-6, positions, table), (q, k, *norms))
    # One token is most of the batch: its gradient is added by several programs.
    ids, embeddings = torch.randint(0, 50, (rows,), device="cuda"), draw(50, width, dtype=dtype)
    ids[: 2 * rows // 3] = 7
    return results + with_gradients((ops.embedding(ids, embeddings),), (embeddings,))


@torch.no_grad()
def chained(rows: int, page_size: int) -> list[Tensor]:
    """A layer's kernels, each while the one before it ends."""
    before = chain.STEPS
    chain.STEPS = ((chain.LARGE, chain.Chain(overlap=True, early=True, fuse=True)),)
    forget()
    try:
        x, weight = draw(rows, 136).detach(), draw(136)
        gate_up, down = draw(2 * 72, 136), draw(136, 72)
        normed, residual = ops.add_rms_norm(x, x, weight, 1e-6)
        act = ops.linear(ops.linear_swiglu(normed, gate_up), down)
        apart = ops.swiglu(ops.linear(normed, gate_up))
        return [residual, act, apart, *paged(page_size, [1] * 3, [0, 64, 2200], 64)]
    finally:
        chain.STEPS = before
        forget()


def cross_entropy(tokens: int, size: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = draw(tokens, size, dtype=dtype), draw(vocabulary, size, dtype=dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    results = with_gradients(tuple(ops.linear_cross_entropy(hidden, weight, targets, 0.7)), (hidden, weight))
    one = ops.linear_cross_entropy_one_pass(
        hidden.detach(), weight.detach(), targets, lambda logprobs, _: -torch.ones_like(logprobs), 0.7
    )
    return [*results, *one]


def experts(tokens: int, hidden: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """A layer of 5 experts, the last never chosen; the last token is padding; then the fused forward."""
    x, logits = draw(tokens, hidden, dtype=dtype), draw(tokens, 5, dtype=FP32)
    gate_up, down = draw(5, 2 * width, hidden, dtype=dtype), draw(5, hidden, width, dtype=dtype)
    bias = torch.tensor([0.0, 0.1, 0.0, -0.1, -9.0], device="cuda")
    settings = {"top_k": 2, "scoring": "sigmoid", "digest": torch.zeros(tokens, dtype=torch.int64, device="cuda")}
    routes = ops.route(logits, bias, **settings)
    chosen = routes.experts.clone()
    chosen[-1] = -1
    groups = ops.group_tokens(chosen, 5)
    act = ops.swiglu(ops.grouped_linear(x, gate_up, groups, gather=True))
    out = ops.combine(ops.grouped_linear(act, down, groups, gather=False), routes.weights, groups, shared=x)
    results = with_gradients((out,), (x, logits, gate_up, down))
    with torch.no_grad():
        padding = torch.arange(tokens, device="cuda") == tokens - 1
        routes, groups = ops.route_and_group(logits, bias, padding=padding, **settings)
        act = ops.grouped_swiglu(x, gate_up, groups, gather=True)
        fused = ops.combine(ops.grouped_linear(act, down, groups, gather=False), routes.weights, groups)
    return [*results, fused]


def few_experts(tokens: int, hidden: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """The same layer for a few tokens in two launches."""
    x, logits = draw(tokens, hidden, dtype=dtype), draw(tokens, 5, dtype=FP32)
    gate_up, down = draw(5, 2 * width, hidden, dtype=dtype), draw(5, hidden, width, dtype=dtype)
    digest = torch.zeros(tokens, dtype=torch.int64, device=x.device)
    padding = torch.arange(tokens, device=x.device) == 2
    settings = 3, "sigmoid", 1, 1, True, 2.5, FP32, 1
    return [few.forward(x, logits, logits[0].contiguous(), digest, padding, gate_up, down, x, *settings)]


@torch.no_grad()
def norm(dtype: torch.dtype) -> list[Tensor]:
    """Matrices whose rows end within a tile, a stretch and 16 bytes."""
    matrices = [draw(*shape, dtype=dtype) for shape in ((1030, 1), (33, 255), (5, 576), (18, 2049), (1, 4097))]
    ends = torch.tensor([len(m) * num_stretches(m.shape[1]) for m in matrices]).cumsum(0).tolist()
    sums = torch.zeros(ends[-1], device="cuda")
    square_sums(matrices, sums, [0, *ends[:-1]])
    return [sums]


@torch.no_grad()
def sampling(rows: int, vocabulary: int) -> list[Tensor]:
    logits = torch.randn(rows, vocabulary, device="cuda")
    temperature = torch.linspace(0, 1.5, rows, device="cuda")
    row = torch.arange(rows, device="cuda")
    params = ops.SamplingTensors(
        temperature, (row % 3 * 5).int(), 1 - row % 2 * 0.2, row % 4 * 0.01, row * 7919, row + 3
    )
    return [ops.sample(logits, params).logprobs]


def cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for rows, n, k in ((1, 73, 50), (37, 96, 72), (300, 264, 136)):
            yield f"linear {rows} {n} {k} {dtype}", lambda r=rows, n=n, k=k, d=dtype: linear(r, n, k, d)
        for heads, dim in (((4, 2), 64), ((3, 1), 40), ((2, 2), 128)):
            yield f"packed {heads} {dim} {dtype}", lambda h=heads, d=dim, t=dtype: packed(h, d, t)
        for tokens, hidden, width in ((1, 72, 40), (300, 136, 72), (2100, 50, 31)):
            yield (
                f"experts {tokens} {hidden} {width} {dtype}",
                lambda n=tokens, h=hidden, w=width, d=dtype: experts(n, h, w, d),
            )
        for tokens, hidden, width in ((1, 72, 40), (4, 50, 31)) if dtype is BF16 else ():
            yield (
                f"experts of {tokens} tokens in two launches {hidden} {width} {dtype}",
                lambda n=tokens, h=hidden, w=width, d=dtype: few_experts(n, h, w, d),
            )
        yield f"square_sums {dtype}", lambda d=dtype: norm(d)
        yield f"rowwise {dtype}", lambda d=dtype: rowwise(101, 200, d)
        for tokens, vocabulary in ((5, 73), (130, 1009)):
            yield (
                f"cross-entropy {vocabulary} {dtype}",
                lambda t=tokens, v=vocabulary, d=dtype: cross_entropy(t, 136, v, d),
            )
    for heads, dims in (((4, 2), (128, 128)), ((9, 3), (64, 64)), ((4, 4), (192, 128)), ((4, 2), (256, 256))):
        yield f"specialised {heads} {dims}", lambda h=heads, d=dims: specialised(h, d)
        for size in (16, 256):
            yield f"specialised {heads} {dims} pages {size}", lambda h=heads, d=dims, s=size: specialised_pages(h, d, s)
    for page_size in (7, 16, 64):
        for new, old in (([1, 1, 1], [0, 64, 2200]), ([3, 70, 1], [5, 0, 130])):
            yield f"pages of {page_size} {new}", lambda p=page_size, n=new, o=old: paged(p, n, o, 64)
    for rows, page_size in ((3, 64), (70, 16)):
        yield f"chained {rows}", lambda r=rows, p=page_size: chained(r, p)
    yield "sampling", lambda: sampling(9, 1009)


def run_case(index: int) -> None:
    torch.manual_seed(index)
    name, run = list(cases())[index]
    bad = [tuple(t.shape) for t in run() if not bool(t.isfinite().all())]
    torch.cuda.synchronize()
    if bad:
        raise RuntimeError(f"{name}: results of shape {bad} are not finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=0, help="only compile, in so many processes")
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    args = parser.parse_args()
    everything = [index for index, (name, _) in enumerate(cases()) if args.match in name]
    if args.processes:
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(run_case, everything))
        return
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        sys.stderr.write("note: without PYTORCH_NO_CUDA_MEMORY_CACHING=1 neighbours in the cache hide small errors\n")
    for index in everything:
        run_case(index)
    print(f"{len(everything)} cases ran, all results finite")


if __name__ == "__main__":
    main()
