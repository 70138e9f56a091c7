"""Row-wise operators and the sampler: error, bit invariance, and bandwidth beside a copy measured in the same run.

    python -m benchmarks.kernels.rowwise --out rowwise.json   # on one GPU; `--only sample` measures the sampler alone

A kernel's share is (bytes it must move / its time) over the bandwidth of a device-to-device copy that counts bytes read
and written. Times are medians: call by call with a cold L2, and for the sampler replays of a CUDA graph, as decoding
runs it. Invariance compares every row of one call with the same rows computed in batches of other sizes, bit for bit.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.shared.clock import environment
from benchmarks.shared.options import needs_gpu, out_file
from vexact.ops.kernels import embedding, rms_norm, sampling, swiglu
from vexact.ops.kernels.rotary import qk_norm_rope, rope
from vexact.ops.rotary.qk_norm_rope import qk_norm_rope_reference

TOKENS = 16384
HIDDEN = (2048, 4096)
INTERMEDIATE = (6144, 12288)
HEADS = (16, 8, 128)  # query heads, key heads, head size
VOCABULARY = 151_936
EPS = 1e-6
BATCHES = (1, 3, 17, 256, 1000, 4099)  # sizes that the invariance check cuts the rows into, in turn

Call = Callable[[slice], tuple[Tensor, ...]]  # computes the outputs of these rows


def milliseconds(call: Callable[[], Any], calls: int = 30) -> float:
    """Median time of a call with a cold L2, the host running ahead as it does in training.

    Clearing a gigabyte takes the GPU longer than the host needs to launch the call that follows.
    """
    clear = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, stop in events:
        clear.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def graph_milliseconds(call: Callable[[], Any]) -> float:
    """Median time of one replay in a CUDA graph, as decoding runs it: the host's launch times stay out."""
    return triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a 1 GiB copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def different_rows(call: Call, rows: int) -> int:
    """Rows whose bits change when they are computed in batches of other sizes, over all ``rows`` rows."""
    whole = call(slice(0, rows))
    count, start, turn = 0, 0, 0
    while start < rows:
        end = min(rows, start + BATCHES[turn % len(BATCHES)])
        for part, full in zip(call(slice(start, end)), whole):
            count += int((_words(part) != _words(full[start:end])).flatten(1).any(1).sum())
        start, turn = end, turn + 1
    return count


def _words(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in fp64."""
    return float(torch.linalg.vector_norm(value.double() - reference) / torch.linalg.vector_norm(reference))


def normal(*shape: int) -> Tensor:
    """Random bf16 on the GPU."""
    return torch.randn(*shape, device="cuda").bfloat16()


def rms_norm_entries(width: int) -> Iterator[dict[str, Any]]:
    """Plain, fused with the residual, and backward."""
    x, residual, dy, weight = normal(TOKENS, width), normal(TOKENS, width), normal(TOKENS, width), normal(width)
    plane = x.numel() * x.element_size()
    y, rstd = rms_norm.forward(x, weight, EPS)
    wide = x.double()
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS)
    yield {
        "op": f"rms_norm {width}",
        "bytes": 2 * plane,
        "ms": milliseconds(lambda: rms_norm.forward(x, weight, EPS)),
        "error": relative_error(y, wide * scale * weight.double()),
        "different_rows": different_rows(lambda s: rms_norm.forward(x[s], weight, EPS), TOKENS),
    }
    fused = rms_norm.add_forward(x, residual, weight, EPS)
    apart = rms_norm.forward(x + residual, weight, EPS)
    unequal = sum(int((_words(a) != _words(b)).any(1).sum()) for a, b in zip((fused[0], fused[2]), apart))
    total = (x + residual).double()
    yield {
        "op": f"add_rms_norm {width}",
        "bytes": 4 * plane,
        "ms": milliseconds(lambda: rms_norm.add_forward(x, residual, weight, EPS)),
        "error": relative_error(
            fused[0], total * torch.rsqrt(total.square().mean(1, keepdim=True) + EPS) * weight.double()
        ),
        "different_rows": unequal
        + different_rows(lambda s: rms_norm.add_forward(x[s], residual[s], weight, EPS), TOKENS),
    }
    dx, dweight = rms_norm.backward(dy, x, weight, rstd)
    normed, scaled = wide * scale, dy.double() * weight.double()
    wide_dx = scale * (scaled - normed * (scaled * normed).mean(1, keepdim=True))
    wide_dweight = (dy.double() * normed).sum(0)
    yield {
        "op": f"rms_norm backward {width}",
        "bytes": 3 * plane,
        "ms": milliseconds(lambda: rms_norm.backward(dy, x, weight, rstd)),
        "error": max(relative_error(dx, wide_dx), relative_error(dweight, wide_dweight)),
        "different_rows": different_rows(lambda s: rms_norm.backward(dy[s], x[s], weight, rstd[s])[:1], TOKENS),
    }


def head_norm_entry() -> dict[str, Any]:
    """Per-head q/k norm is the row norm of (tokens x heads) short rows."""
    rows, width = TOKENS * HEADS[0], HEADS[2]
    x, weight = normal(rows, width), normal(width)
    wide = x.double()
    y, _ = rms_norm.forward(x, weight, EPS)
    return {
        "op": f"q norm {HEADS[0]} x {width}",
        "bytes": 2 * x.numel() * x.element_size(),
        "ms": milliseconds(lambda: rms_norm.forward(x, weight, EPS)),
        "error": relative_error(y, wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS) * weight.double()),
        "different_rows": different_rows(lambda s: rms_norm.forward(x[s], weight, EPS), rows),
    }


def rope_entries() -> Iterator[dict[str, Any]]:
    """Queries and keys, read as views of one fused projection, in one launch: rotated, or normalised and rotated."""
    num_q_heads, num_kv_heads, size = HEADS
    fused = normal(TOKENS, (num_q_heads + 2 * num_kv_heads) * size)
    q = fused[:, : num_q_heads * size].view(TOKENS, num_q_heads, size)
    k = fused[:, num_q_heads * size : (num_q_heads + num_kv_heads) * size].view(TOKENS, num_kv_heads, size)
    positions = torch.randint(0, 32768, (TOKENS,), device="cuda")
    angles = torch.arange(32768, device="cuda")[:, None] * 1e6 ** (-torch.arange(0, size, 2, device="cuda") / size)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).float()
    cos, sin = (part[positions][:, None].double() for part in (cos_sin[:, : size // 2], cos_sin[:, size // 2 :]))
    first, second = q.double().chunk(2, -1)
    reference = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    num_bytes = 2 * (num_q_heads + num_kv_heads) * size * TOKENS * 2 + TOKENS * size * 4
    yield {
        "op": f"rope {num_q_heads}+{num_kv_heads} x {size}",
        "bytes": num_bytes,
        "ms": milliseconds(lambda: rope.forward(q, k, positions, cos_sin, False)),
        "error": relative_error(rope.forward(q, k, positions, cos_sin, False)[0], reference),
        "different_rows": different_rows(lambda s: rope.forward(q[s], k[s], positions[s], cos_sin, False), TOKENS),
    }
    weights = normal(2, size)

    def both(q_rows: Tensor, k_rows: Tensor, rows: slice) -> tuple[Tensor, ...]:
        return qk_norm_rope.forward(q_rows[rows], k_rows[rows], *weights, EPS, positions[rows], cos_sin)

    everything, few = slice(0, TOKENS), slice(0, 1024)
    copied = both(q.contiguous(), k.contiguous(), everything)
    moved = sum(int((_words(a) != _words(b)).sum()) for a, b in zip(both(q, k, everything), copied))
    yield {
        "op": f"qk_norm_rope {num_q_heads}+{num_kv_heads} x {size}",
        "bytes": num_bytes,
        "ms": milliseconds(lambda: both(q, k, everything)),
        "error": relative_error(
            copied[0][few], qk_norm_rope_reference(q[few], weights[0], EPS, positions[few], cos_sin)
        ),
        "different_rows": different_rows(lambda s: both(q, k, s), TOKENS) + moved,
    }


def swiglu_entries(width: int) -> Iterator[dict[str, Any]]:
    """Forward and backward."""
    gate_up, dy = normal(TOKENS, 2 * width), normal(TOKENS, width)
    few = slice(0, 1024)
    gate, up = gate_up[few].double().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    yield {
        "op": f"swiglu {width}",
        "bytes": 3 * dy.numel() * 2,
        "ms": milliseconds(lambda: swiglu.forward(gate_up)),
        "error": relative_error(swiglu.forward(gate_up)[few], gate * sigmoid * up),
        "different_rows": different_rows(lambda s: (swiglu.forward(gate_up[s]),), TOKENS),
    }
    wide_dy = dy[few].double()
    reference = torch.cat((wide_dy * up * sigmoid * (1 + gate * (1 - sigmoid)), wide_dy * gate * sigmoid), -1)
    yield {
        "op": f"swiglu backward {width}",
        "bytes": 5 * dy.numel() * 2,
        "ms": milliseconds(lambda: swiglu.backward(dy, gate_up)),
        "error": relative_error(swiglu.backward(dy, gate_up)[few], reference),
        "different_rows": different_rows(lambda s: (swiglu.backward(dy[s], gate_up[s]),), TOKENS),
    }


def embedding_entries(width: int) -> Iterator[dict[str, Any]]:
    """Gather, and the gradient of a Zipf-like batch (the dense output is most of its bytes)."""
    weight, dy = normal(VOCABULARY, width), normal(TOKENS, width)
    ids = (VOCABULARY ** torch.rand(TOKENS, device="cuda", dtype=torch.float64)).long().clamp_(max=VOCABULARY - 1)
    yield {
        "op": f"embedding {width}",
        "bytes": 2 * dy.numel() * 2,
        "ms": milliseconds(lambda: embedding.forward(ids, weight)),
        "error": relative_error(embedding.forward(ids, weight), weight[ids].double()),
        "different_rows": different_rows(lambda s: (embedding.forward(ids[s], weight),), TOKENS),
    }
    first = embedding.backward(dy, ids, VOCABULARY)
    again = embedding.backward(dy, ids, VOCABULARY)
    reference = torch.zeros(VOCABULARY, width, device="cuda", dtype=torch.float64).index_add_(0, ids, dy.double())
    yield {
        "op": f"embedding backward {width}",
        "bytes": (2 * dy.numel() + weight.numel()) * 2,
        "ms": milliseconds(lambda: embedding.backward(dy, ids, VOCABULARY)),
        "error": relative_error(first, reference),
        "different_rows": int((_words(first) != _words(again)).any(1).sum()),
    }


def peaked_logits(batch: int) -> Tensor:
    """Noise with a hundred likely tokens per row, as a trained model has."""
    logits = torch.randn(batch, VOCABULARY, device="cuda") * 2
    likely = torch.randint(0, VOCABULARY, (batch, 100), device="cuda")
    return logits.scatter_add_(1, likely, torch.rand(batch, 100, device="cuda") * 16)


def sampling_entries(batch: int) -> Iterator[dict[str, Any]]:
    """The whole sampler, log-prob included, against two reads of the logits; each kind of filter on every row."""
    flat, peaked = torch.randn(batch, VOCABULARY, device="cuda") * 2.5, peaked_logits(batch)
    ones, off = torch.ones(batch, device="cuda"), torch.zeros(batch, device="cuda")
    seed, position = torch.arange(batch, device="cuda") * 2**33 + 1, torch.arange(batch, device="cuda")
    for label, logits, top_k, top_p, min_p in (
        ("", peaked, 0, 1.0, 0.0),
        (" top_k=50", peaked, 50, 1.0, 0.0),
        (" top_p=0.95", peaked, 0, 0.95, 0.0),
        (" top_p=0.95 flat", flat, 0, 0.95, 0.0),
        (" min_p=0.05", peaked, 0, 1.0, 0.05),
    ):
        parameters = (ones, (off + top_k).int(), ones * top_p, ones * min_p, seed, position)

        def call(
            rows: slice, logits: Tensor = logits, parameters: tuple[Tensor, ...] = parameters
        ) -> tuple[Tensor, ...]:
            return sampling.sample(logits[rows], *(parameter[rows] for parameter in parameters))

        tokens, logprobs, min_logit = call(slice(None))
        z = logits.double().masked_fill(logits < min_logit[:, None], float("-inf"))
        reference = torch.log_softmax(z, 1).gather(1, tokens[:, None])[:, 0]
        yield {
            "op": f"sample {batch} x {VOCABULARY}{label}",
            "bytes": 2 * logits.numel() * 4,
            "ms": graph_milliseconds(functools.partial(call, slice(None))),
            "error": relative_error(logprobs, reference),
            "different_rows": different_rows(call, batch),
        }


def entries(prefix: str) -> Iterator[dict[str, Any]]:
    """The lines of the table whose group starts with ``prefix``."""
    groups: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        **{f"rms_norm {width}": functools.partial(rms_norm_entries, width) for width in HIDDEN},
        "rms_norm heads": lambda: [head_norm_entry()],
        "rope": rope_entries,
        **{f"swiglu {width}": functools.partial(swiglu_entries, width) for width in INTERMEDIATE},
        "embedding": functools.partial(embedding_entries, HIDDEN[0]),
        **{f"sample {batch}": functools.partial(sampling_entries, batch) for batch in (256, 1)},
    }
    for name, group in groups.items():
        if name.startswith(prefix):
            yield from group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date to record")
    parser.add_argument("--only", default="", help="measure only groups that start so: rms_norm, rope, sample 256, ...")
    parser.add_argument("--out", type=out_file, help="write the table as JSON here")
    arguments = parser.parse_args()
    needs_gpu(parser)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        **environment(),
        "date": arguments.date,
        "tokens": TOKENS,
        "dtype": "bfloat16, logits float32",
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "entries": [],
    }
    print(f"{result['gpu']}: copy {result['copy_gb_per_s']} GB/s, {TOKENS} tokens, bf16")
    print(f"{'op':38} {'us':>8} {'GB/s':>7} {'share':>6} {'error':>9} {'different rows':>15}")
    for entry in entries(arguments.only):
        rate = entry["bytes"] / (entry["ms"] * 1e-3)
        entry |= {"gb_per_s": round(rate / 1e9, 1), "share_of_copy": round(rate / bandwidth, 3)}
        result["entries"].append(entry)
        print(
            f"{entry['op']:38} {entry['ms'] * 1e3:8.1f} {rate / 1e9:7.0f} {rate / bandwidth:6.2f} "
            f"{entry['error']:9.1e} {entry['different_rows']:15}"
        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
