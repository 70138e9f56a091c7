"""Fused linear cross-entropy against its matrix products in the vendor's library, and against Liger if installed.

    python -m benchmarks.kernels.linear_cross_entropy                      # prints the table
    python -m benchmarks.kernels.linear_cross_entropy --out results.json   # and keeps it

The general form is a forward and a backward that recomputes the logits: four products. The one-pass form takes the
derivative of a per-token loss on the way and recomputes nothing: three products. Extra memory counts everything
allocated at the peak beyond the inputs, the gradients that are returned included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor

from benchmarks.shared.clock import environment
from benchmarks.shared.options import at_least_one, needs_gpu, out_file
from vexact.ops.kernels import linear, linear_cross_entropy
from vexact.ops.kernels.logprob import token_logprobs


def timed(call: Callable[[], object], repeats: int = 5) -> float:
    """Median milliseconds of ``call``."""
    call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)


def extra_gib(call: Callable[[], object]) -> float:
    """Peak memory of ``call`` beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def stock_products(hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """Milliseconds of the three different products over all tokens at once, bf16 in and out."""
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    times = {"logits": timed(lambda: torch.mm(hidden, weight.t(), out=logits))}
    times["dhidden"] = timed(lambda: torch.mm(logits, weight, out=dhidden))
    times["dweight"] = timed(lambda: torch.mm(logits.t(), hidden, out=dweight))
    return times


def fused_calls(hidden: Tensor, weight: Tensor, rows: tuple[Tensor, ...], dlogprobs: Tensor) -> dict[str, Callable]:
    """The two forms, and the parts of the general one."""

    def forward() -> tuple[Tensor, ...]:
        return linear_cross_entropy.forward(hidden, weight, *rows)

    _, lse, entropy = forward()

    def backward() -> tuple[Tensor, ...]:
        return linear_cross_entropy.backward(dlogprobs, None, hidden, weight, *rows, lse, entropy)

    def backward_with_entropy() -> tuple[Tensor, ...]:
        return linear_cross_entropy.backward(dlogprobs, dlogprobs, hidden, weight, *rows, lse, entropy)

    def one_pass() -> tuple[Tensor, ...]:
        return linear_cross_entropy.one_pass(hidden, weight, *rows, lambda _, at: dlogprobs[at])

    return {
        "general": lambda: (forward(), backward()),
        "one_pass": one_pass,
        "forward": forward,
        "backward": backward,
        "backward with entropy": backward_with_entropy,
    }


def liger_calls(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable]:
    """Liger's fused linear cross-entropy (mean loss; gradients in its forward), with bf16 and fp32 accumulation."""
    if find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(accumulate: torch.dtype | None) -> tuple[Tensor, ...]:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        options = (None, None, -100, 0.0, 0.0, "mean", None, False, accumulate)
        outputs = LigerFusedLinearCrossEntropyFunction.apply(x, w, targets, *options)
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        return torch.autograd.grad(loss, (x, w))

    return {"liger": lambda: call(None), "liger, fp32 accumulation": lambda: call(torch.float32)}


def rows_different(hidden: Tensor, weight: Tensor, rows: tuple[Tensor, ...]) -> tuple[int, int]:
    """(tokens compared, tokens differing) between the fused forward and logits of decode-sized batches."""
    fused = linear_cross_entropy.forward(hidden, weight, *rows)[0]
    compared = differing = start = 0
    for size in (1, 3, 16, 40, 64, 100, 256, 700, 1024):
        part = slice(start, start + size)
        logits = linear.forward(hidden[part], weight, None, torch.float32)
        alone = token_logprobs(logits, *(row[part] for row in rows))[0]
        differing += int((alone.view(torch.int32) != fused[part].view(torch.int32)).sum())
        compared, start = compared + size, start + size
    return compared, differing


def run_table(tokens: int, vocabulary: int, size: int) -> dict:
    """Measure everything at one size and print a line per implementation."""
    device = "cuda"
    hidden = torch.randn(tokens, size, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, size, device=device, dtype=torch.bfloat16) * size**-0.5
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    rows = (targets, torch.full((tokens,), 1.25, device=device), torch.full((tokens,), float("-inf"), device=device))
    products = stock_products(hidden, weight)
    three = sum(products.values())
    four = three + products["logits"]
    calls = fused_calls(hidden, weight, rows, torch.randn(tokens, device=device))
    calls |= liger_calls(hidden, weight, targets)
    record: dict = {"tokens": tokens, "vocabulary": vocabulary, "hidden": size, "stock_ms": products, "results": {}}
    print(f"T {tokens} V {vocabulary} H {size}; stock products ms:", {k: round(v, 2) for k, v in products.items()})
    for name, call in calls.items():
        ms, gib = timed(call), extra_gib(call)
        record["results"][name] = {"ms": ms, "of_four": ms / four, "of_three": ms / three, "extra_gib": gib}
        print(f"{name:26s} {ms:8.2f} ms  {ms / four:.3f} of four  {ms / three:.3f} of three  {gib:.2f} GiB", flush=True)
    record["tokens_compared"], record["tokens_different"] = rows_different(hidden, weight, rows)
    print("tokens compared", record["tokens_compared"], "different", record["tokens_different"])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--tokens", type=at_least_one, default=16384)
    args = parser.parse_args()
    needs_gpu(parser)
    torch.manual_seed(0)
    tables = [run_table(args.tokens, 151936, size) for size in (2048, 4096)]
    if args.out:
        args.out.write_text(json.dumps({**environment(), "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
