"""The same layer by other libraries, each where it can be imported: vLLM, Liger and SonicMoE beside ours.

    python -m benchmarks.moe.peers liger --shape Qwen3-30B-A3B --seconds 60 --out liger.json

``speed.py`` runs this once for every peer and shape, each in a process of its own. A peer is given tokens and router
logits, routes them with its own kernel if it has one, and returns the layer's output. It is timed only where that
output, and in training the gradients of the tokens and the matrices, are ours but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

from benchmarks.moe.cases import MOONLIGHT, QWEN3, REHEARSAL, MoeShape, make_weights
from benchmarks.moe.layer import Layer
from benchmarks.shared.clock import median_ms
from benchmarks.shared.options import needs_gpu, out_file

Forward = Callable[[Layer, Tensor, Tensor], Tensor]
Record = dict[str, Any]
SHAPES = {shape.name: shape for shape in (QWEN3, MOONLIGHT)}
CLOSE = 0.02  # of the norm: bf16 rounds each of a few steps by at most 0.004
CLOSE_LOGITS = 0.1  # Liger adds the gradients of weights in bf16
CHECKED = 200  # tokens compared before anything is timed: experts with many rows, few and none


@dataclass(frozen=True, slots=True)
class Peer:
    """Another library's layer, ``forward(layer, x, logits)``."""

    version: str
    forward: Forward
    captured: bool = False  # in a CUDA graph: it never waits for the device
    trains: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of the first call, and of the calls that are timed."""

    first: int = 16384
    forward: tuple[int, ...] = (16384, 5120, 4096, 32768, 64, 1, 16, 256)  # the ones that matter first
    train: tuple[int, ...] = (16384, 32768, 4096)


def liger() -> Peer:
    """Its own grouped kernels; it routes in torch and reads the number of tiles on the host. What it finds best at its
    first call, it keeps for all sizes."""
    from liger_kernel.ops import fused_moe_kernels
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    tune_briefly(vars(fused_moe_kernels).values())

    def forward(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = layer.stock_routes(logits)
        out = LigerFusedMoEFunction.apply(x, layer.weights.gate_up, layer.weights.down, experts.int(), weights)
        return layer.add_shared(out, x)

    return Peer(f"liger-kernel {version('liger-kernel')}", forward, trains=True)


def vllm() -> Peer:
    """``fused_topk`` and the Triton ``fused_experts``, as its unquantised models run on one GPU."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    for op in ("moe_align_block_size", "moe_sum", "topk_softmax", "topk_sigmoid"):
        if not hasattr(torch.ops._moe_C, op):
            raise ImportError(f"vllm is installed without its compiled {op}")

    def forward(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        shape = layer.shape
        weights, experts, _ = fused_topk(x, logits, shape.top_k, renormalize=True, scoring_func=shape.scoring)
        out = fused_experts(x, layer.weights.gate_up, layer.weights.down, weights, experts)
        return layer.add_shared(out, x)

    return Peer(f"vllm {version('vllm')}", forward, captured=True)


def sonic() -> Peer:
    """Its products in CuTe; its general entry, since its own router takes softmax alone. Routes in torch."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    def forward(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = layer.stock_routes(logits)
        tokens, top_k = experts.shape
        token = torch.arange(tokens, device=x.device, dtype=torch.int32).repeat_interleave(top_k)
        out, _ = moe_general_routing_inputs(
            x,
            weights.float().flatten(),
            token,
            experts.int().flatten(),
            layer.weights.gate_up.permute(1, 2, 0),
            None,
            layer.weights.down.permute(1, 2, 0),
            None,
            layer.shape.experts,
            torch.cuda.current_stream().cuda_stream if x.is_cuda else 0,
            ActivationType.SWIGLU,
            not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return layer.add_shared(out, x)

    return Peer(f"sonic-moe {version('sonic-moe')}, quack-kernels {version('quack-kernels')}", forward, trains=True)


def tune_briefly(kernels: Iterable[object]) -> None:
    """Those of ``kernels`` that tune themselves take 25 ms a variant for it, not 125: Liger's have 240 variants."""
    for kernel in kernels:
        if isinstance(kernel, Autotuner):
            kernel._do_bench = partial(do_bench, warmup=5, rep=20)


PEERS: dict[str, Callable[[], Peer]] = {"vllm": vllm, "liger": liger, "sonic": sonic}


def reason(error: BaseException) -> str:
    """One line for ``not_run``."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def unlike(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference of that of ours; infinite where theirs is not finite."""
    error = float((theirs.double() - ours.double()).norm() / ours.double().norm())
    return error if error == error else float("inf")


def check(layer: Layer, peer: Peer) -> dict[str, float]:
    """How far its output is from ours, and the gradients of tokens, logits and matrices.

    Raises:
        ValueError: something is further away than rounding explains.
    """
    x, logits = layer.inputs(CHECKED, 1)
    with torch.no_grad():
        errors = {"output": unlike(layer.forward(x, logits), peer.forward(layer, x, logits))}
    if peer.trains:
        found = []
        for forward in (layer.forward, bound(layer, peer)):
            torch.manual_seed(1)  # the same tokens, and the same gradient of the output
            found.append(layer.step(forward, CHECKED, 1)())
        for name, ours, theirs in zip(("tokens", "logits", "gate_up", "down"), *found, strict=True):
            errors[f"gradient of {name}"] = unlike(ours, theirs)
    for name, error in errors.items():
        close = CLOSE_LOGITS if name == "gradient of logits" else CLOSE
        if not error <= close:
            raise ValueError(f"its {name} is not ours: relative error {error:.3g}, of which {close} would be rounding")
    return errors


def bound(layer: Layer, peer: Peer) -> Callable[[Tensor, Tensor], Tensor]:
    """Its forward as a method of ``layer``."""
    return lambda x, logits: peer.forward(layer, x, logits)


def eager_ms(calls: list[Callable[[], object]], rounds: int = 5) -> float:
    """Median time of one of ``calls``, launched by the host one after another."""
    calls = calls * max(1, 4 // len(calls))
    times = []
    for _ in range(rounds + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    return median(times[1:])


def forward_us(layer: Layer, peer: Peer, tokens: int) -> float:
    """Microseconds of one layer: in a graph if it can be captured, else launched by the host."""

    def call(x: Tensor, logits: Tensor) -> Callable[[], object]:
        return torch.no_grad()(lambda: peer.forward(layer, x, logits))

    calls = [call(*layer.inputs(tokens, seed)) for seed in range(max(1, min(16, 256 // tokens)))]
    for one in calls[:2]:
        one()  # compiled and tuned before the clock runs
    return (median_ms(calls, target_ms=2.0) if peer.captured else eager_ms(calls)) * 1e3


def measure(name: str, shape: MoeShape, sizes: Sizes, seconds: float, keep: Callable[[Record], None]) -> Record:
    """Errors, µs and TFLOP/s of forwards, TFLOP/s of training; ``keep`` is given the record after every figure.

    What does not begin within ``seconds``, and what fails, is in its ``not_run`` with the reason.
    """
    record: Record = {"forward": {}, "training": {}, "not_run": {}}
    try:
        peer = PEERS[name]()
    except Exception as error:  # an import may fail in whatever way a library's start-up can
        record["not_run"]["all of it"] = reason(error)
        return record
    layer = Layer(shape, make_weights(shape))
    record |= {"version": peer.version, "captured": peer.captured}

    def called() -> None:
        with torch.no_grad():
            peer.forward(layer, *layer.inputs(sizes.first, 0))
        if peer.trains:
            layer.step(bound(layer, peer), sizes.first, 0)()

    def checked() -> None:
        record["errors"] = check(layer, peer)

    def timed(tokens: int) -> None:
        us = forward_us(layer, peer, tokens)
        record["forward"][tokens] = {"us": us, "tflops": layer.shape.flops(tokens) / us / 1e6}

    def trained(tokens: int) -> None:
        step = layer.step(bound(layer, peer), tokens, 0)
        step()
        ms, (saved, peak) = eager_ms([step], rounds=3), layer.memory(step)
        tflops = 3 * layer.shape.flops(tokens) / ms / 1e9
        record["training"][tokens] = {"ms": ms, "tflops": tflops, "saved_gib": saved, "peak_gib": peak}

    work: list[tuple[str, Callable[[], None]]] = [("first calls", called), ("check", checked)]
    work += [(f"forward of {n} tokens", partial(timed, n)) for n in sizes.forward]
    work += [(f"training on {n} tokens", partial(trained, n)) for n in sizes.train if peer.trains]
    began = math.inf
    for what, step in work:
        try:
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"{seconds:.0f} s are over")
            step()
        except Exception as error:  # whatever a compiler, a tuner or a device may raise
            record["not_run"][what] = reason(error)
        keep(record)
        if {"first calls", "check"} & record["not_run"].keys():
            break
        began = min(began, time.monotonic())
    return record


def in_its_own_process(name: str, shape: MoeShape, seconds: float) -> Record:
    """The record of such a process, which ends with it whatever happens there."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "peer.json")
        command = [sys.executable, "-m", "benchmarks.moe.peers", name, "--shape", shape.name, "--seconds", str(seconds)]
        try:
            done = subprocess.run([*command, "--out", out], timeout=1.5 * seconds + 40, capture_output=True, text=True)
            ending = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
        except subprocess.TimeoutExpired:
            done, ending = None, f"stopped after {1.5 * seconds + 40:.0f} s"
        record: Record = json.loads(out.read_text()) if out.exists() else {"forward": {}, "training": {}, "not_run": {}}
    if done is None or done.returncode:
        record["not_run"]["the rest"] = ending[:300]
    print(f"{name}, {shape.name}: {line(record)}", flush=True)
    return record


def line(record: Record) -> str:
    """All of it in a line."""
    parts = [record["version"]] if "version" in record else []
    parts += [f"{what} differs by {error:.4f}" for what, error in record.get("errors", {}).items()]
    parts += [f"{n}: {one['us']:.1f} us, {one['tflops']:.0f} TFLOP/s" for n, one in record["forward"].items()]
    parts += [f"training {n}: {one['tflops']:.0f} TFLOP/s" for n, one in record["training"].items()]
    parts += [f"{what} NOT RUN: {why}" for what, why in record["not_run"].items()]
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--shape", choices=[*SHAPES, REHEARSAL.name], default=QWEN3.name)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm", action="store_true", help="only check it, so that its kernels are compiled on disk")
    parser.add_argument("--out", type=out_file, default=Path("peer.json"))
    args = parser.parse_args()
    rehearsed = args.shape == REHEARSAL.name
    if not rehearsed:
        needs_gpu(parser)
    shape, sizes = (REHEARSAL, Sizes(16, (1, 16), (16,))) if rehearsed else (SHAPES[args.shape], Sizes())
    if args.warm:
        sizes = Sizes(sizes.first, (), ())

    def keep(record: Record) -> None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    record = measure(args.peer, shape, sizes, args.seconds, keep)
    keep(record)
    print(line(record), flush=True)


if __name__ == "__main__":
    main()
