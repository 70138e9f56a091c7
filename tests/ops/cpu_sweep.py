"""Every shape small enough to be odd, through the CPU twins: which of them give a row other bits in other company?

    python tests/ops/cpu_sweep.py [--full]

prints one line per operator and exits with 1 if any shape differs. The tests run the short form here and, in processes
of their own, on the code paths that MKL takes on other processors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vexact.ops import (
    PackedMetadata,
    add_rms_norm,
    attention,
    combine,
    group_tokens,
    grouped_linear,
    latent_rope,
    linear,
    linear_cross_entropy,
    rms_norm,
    rope,
    route,
    swiglu,
    token_logprobs,
)
from vexact.ops.cpu import attention as cpu_attention
from vexact.ops.cpu import linear as cpu_linear
from vexact.ops.cpu import rms_norm as cpu_rms_norm
from vexact.ops.cpu import swiglu as cpu_swiglu

SMALL = (*range(1, 41), 63, 64, 65, 100)
ROWS = 101
COMPANY = (1, 2, 3, 5, 8, 23, 24, 25, 32, 47, 48, 49, 97)  # rows in a batch, from row 2 on
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Rows = Callable[..., Tensor]


def rows_differ(fn: Rows, *inputs: Tensor) -> bool:
    """Whether ``fn`` of some rows of the inputs is anywhere unlike the same rows of ``fn`` of all."""
    whole = fn(*inputs)
    for count in COMPANY:
        if not torch.equal(fn(*(x[2 : 2 + count] for x in inputs)), whole[2 : 2 + count]):
            return True
    order = torch.randperm(len(whole))
    if not torch.equal(fn(*(x[order] for x in inputs)), whole[order]):
        return True
    return not torch.equal(fn(*map(misaligned, inputs)), whole)


def misaligned(x: Tensor) -> Tensor:
    """The same values, one element past an aligned address."""
    buffer = x.new_empty(x.numel() + 1)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def linear_shapes(full: bool) -> Iterator[tuple[int, int]]:
    """(N, K), each small one against a few of the other axis, and some as large as a model's."""
    others = SMALL if full else (1, 7, 16, 33, 64)
    yield from ((n, k) for n in SMALL for k in others)
    yield from ((n, k) for n in others for k in SMALL)
    yield from ((48, 1536), (1031, 96), (130, 1000), (2049, 24)) if not full else LARGE


LARGE = [(n, k) for n in (16, 48, 64, 130, 576, 1031, 2049) for k in (128, 257, 384, 500, 1000, 1536, 3000)]


def check_linear(full: bool, dtype: torch.dtype) -> list[object]:
    """Forward and gradient by x, alone, in company, misaligned, and with other numbers of threads."""
    bad = []
    for n, k in dict.fromkeys(linear_shapes(full)):
        x, dy, weight = (torch.randn(shape).to(dtype) for shape in ((ROWS, k), (ROWS, n), (n, k)))

        def forward(x: Tensor, weight: Tensor = weight) -> Tensor:
            return linear(x, weight)

        def backward(dy: Tensor, weight: Tensor = weight) -> Tensor:
            return cpu_linear.grad_input(dy, weight)

        if (
            rows_differ(forward, x)
            or rows_differ(backward, dy)
            or not torch.equal(forward(x), linear(x, misaligned(weight)))
            or threads_differ(forward, x)
            or threads_differ(backward, dy)
        ):
            bad.append((n, k))
    return bad


def threads_differ(fn: Rows, x: Tensor) -> bool:
    """Whether the number of threads, few rows or many, changes a bit."""
    before = torch.get_num_threads()
    expected = fn(x)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            if not (torch.equal(fn(x), expected) and torch.equal(fn(x[:7]), expected[:7])):
                return True
    finally:
        torch.set_num_threads(before)
    return False


HEADS = ((1, 1), (2, 1), (4, 2), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1), (16, 2))


def attention_shapes(full: bool) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(head_dim, value_dim, heads)."""
    if full:
        yield from ((dim, dim, heads) for dim in SMALL for heads in HEADS)
        yield from ((dim, value_dim, (4, 1)) for dim in (6, 16, 33) for value_dim in SMALL)
    else:
        yield from ((dim, dim, (4, 1)) for dim in (*range(1, 25, 2), 2, 6, 8, 10, 16, 33, 64))
        yield from ((dim, value_dim, heads) for dim, value_dim in ((6, 11), (16, 16), (8, 3)) for heads in HEADS)


def check_attention(full: bool, dtype: torch.dtype) -> list[object]:
    """Every token decoded, together and alone, against the packed sequence."""
    return [shape for shape in attention_shapes(full) if decoded_rows_differ(*shape, dtype)]


def decoded_rows_differ(dim: int, value_dim: int, heads: tuple[int, int], dtype: torch.dtype, length: int = 70) -> bool:
    q, k, v = (
        torch.randn(length, count, width).to(dtype)
        for count, width in ((heads[0], dim), (heads[1], dim), (heads[1], value_dim))
    )
    packed = attention(q, k, v, PackedMetadata.from_lengths([length]), 0.3)

    def decode(rows: Tensor) -> Tensor:
        """Token i of ``rows`` over its i + 1 keys, which are one page each."""
        ends = torch.arange(len(rows) + 1, dtype=torch.int32)
        table = torch.arange(length, dtype=torch.int32).expand(len(rows), -1)
        keys = (rows + 1).to(torch.int32)
        caches = k.unsqueeze(1), v.unsqueeze(1)
        return cpu_attention.paged_forward(q[rows], *caches, ends, keys, table, 1, length, 0.3, True)[0]

    every = torch.arange(length)
    if not torch.equal(decode(every), packed):
        return True
    alone = (0, 1, 3, 16, 63, 64, length - 1)
    if any(not torch.equal(decode(every[i : i + 1]), packed[i : i + 1]) for i in alone):
        return True
    begun = [3, length - 3]  # as two sequences: what a prefix cache or a chunked prefill computes first
    return not torch.equal(attention(q, k, v, PackedMetadata.from_lengths(begun), 0.3)[:3], packed[:3])


def check_rowwise(full: bool, dtype: torch.dtype) -> list[object]:
    """Norms, rotary embedding and activation with their gradients."""
    bad: list[object] = []
    for width in SMALL if full else (*range(1, 20), 33, 64, 100):
        x, y = (torch.randn(ROWS, width).to(dtype) for _ in range(2))
        weight, wide = torch.randn(width).to(dtype), torch.randn(ROWS, 2 * width).to(dtype)
        rstd = torch.rand(ROWS) + 0.5
        heads, positions = wide.view(ROWS, 1, 2 * width), torch.arange(ROWS)
        table = torch.randn(ROWS, 2 * width)
        cases: dict[str, tuple[Rows, tuple[Tensor, ...]]] = {
            "rms_norm": (lambda x, w=weight: rms_norm(x, w, 1e-6), (x,)),
            "add_rms_norm": (lambda x, y, w=weight: add_rms_norm(x, y, w, 1e-6)[0], (x, y)),
            "rms_norm dx": (lambda dy, x, r, w=weight: cpu_rms_norm.backward(dy, x, w, r)[0], (y, x, rstd)),
            "rope": (lambda q, p, t=table: rope(q, q, p, t)[0], (heads, positions)),
            "latent_rope": (
                lambda q, k, p, t=table: latent_rope(q, q[..., :0], k, p, t, True)[0],
                (heads, wide, positions),
            ),
            "swiglu": (swiglu, (wide,)),
            "swiglu dx": (cpu_swiglu.backward, (x, wide)),
        }
        bad += [(name, width) for name, (fn, inputs) in cases.items() if rows_differ(fn, *inputs)]
    return bad


def check_logprob(full: bool, dtype: torch.dtype) -> list[object]:
    """The sampler's log-probabilities alone and in company, against the trainer's, and the trainer's gradient."""
    bad: list[object] = []
    for width in SMALL if full else (*range(1, 20), 33, 64, 100):
        hidden, weight = torch.randn(ROWS, 24).to(dtype), torch.randn(width, 24).to(dtype)
        targets, scale = torch.arange(ROWS) % width, torch.full((ROWS,), 0.8)
        keep_all = torch.full((ROWS,), float("-inf"))

        def sampled(hidden: Tensor, targets: Tensor, scale: Tensor, keep: Tensor, weight: Tensor = weight) -> Tensor:
            logits = linear(hidden, weight, out_dtype=torch.float32)
            return torch.stack(token_logprobs(logits, targets, scale, keep), dim=1)

        def trained(hidden: Tensor, targets: Tensor, scale: Tensor, keep: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.stack(linear_cross_entropy(hidden, weight, targets, scale, keep), dim=1)

        def gradient(hidden: Tensor, targets: Tensor, scale: Tensor, keep: Tensor, weight: Tensor = weight) -> Tensor:
            leaf = hidden.detach().clone().requires_grad_()
            linear_cross_entropy(leaf, weight, targets, scale, keep).logprobs.sum().backward()
            assert leaf.grad is not None
            return leaf.grad

        rows = hidden, targets, scale, keep_all
        if any(rows_differ(fn, *rows) for fn in (sampled, trained, gradient)):
            bad.append(width)
        elif not torch.equal(sampled(*rows)[:, [0, 2]], trained(*rows)):
            bad.append((width, "sampler and trainer"))
    return bad


def check_moe(full: bool, dtype: torch.dtype) -> list[object]:
    """Routes, products by expert and their sum, with the gradient of a token; and whether a row is that of linear."""
    bad: list[object] = []
    experts = torch.tensor([[0, 1]], dtype=torch.int32).repeat(ROWS, 1)
    experts[:3, 1] = 2  # an expert with few rows
    shapes = linear_shapes(full) if full else ((1, 16), (7, 33), (16, 16), (33, 7), (64, 96), (16, 1), (1031, 24))
    for n, k in dict.fromkeys(shapes):
        x, dy = torch.randn(ROWS, k).to(dtype), torch.randn(ROWS, k).to(dtype)
        inner, outer = torch.randn(3, 2 * n, k).to(dtype), torch.randn(3, k, n).to(dtype)
        router = torch.randn(3, k).to(dtype)
        groups = group_tokens(experts, 3)
        places = grouped_linear(x, inner, groups, gather=True)
        owners = torch.repeat_interleave(torch.arange(3), groups.offsets.diff())
        dense = torch.stack([linear(x, matrix) for matrix in inner])
        if not torch.equal(places, dense[owners, groups.rows.long() // 2]):
            bad.append((n, k, "linear"))

        def layer(x: Tensor, router: Tensor = router, inner: Tensor = inner, outer: Tensor = outer) -> Tensor:
            routes = route(linear(x, router, out_dtype=torch.float32), top_k=2)
            groups = group_tokens(routes.experts, 3)
            hidden = swiglu(grouped_linear(x, inner, groups, gather=True))
            return combine(grouped_linear(hidden, outer, groups, gather=False), routes.weights, groups)

        def gradient(x: Tensor, dy: Tensor, layer: Rows = layer) -> Tensor:
            leaf = x.detach().clone().requires_grad_()
            return torch.autograd.grad(layer(leaf), leaf, dy)[0]

        if rows_differ(layer, x) or rows_differ(gradient, x, dy) or threads_differ(layer, x):
            bad.append((n, k))
    return bad


CHECKS = {
    "linear": check_linear,
    "attention": check_attention,
    "rowwise": check_rowwise,
    "logprob": check_logprob,
    "moe": check_moe,
}


def main(full: bool) -> int:
    found = 0
    for name, check in CHECKS.items():
        for dtype in DTYPES if full else DTYPES[:1]:
            torch.manual_seed(0)
            bad = check(full, dtype)
            found += len(bad)
            sys.stdout.write(f"{name} {dtype}: {len(bad)} shapes differ {bad[:6]}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main("--full" in sys.argv))
