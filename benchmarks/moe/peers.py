"""The same layer by other libraries, each where it can be imported: vLLM, Liger and SonicMoE beside ours.

A peer is given tokens and router logits, routes them with its own kernel if it has one, and returns the layer's output.
It is timed only where that output, and in training the gradients of the tokens and the matrices, are ours but for
rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.moe.layer import Layer
from benchmarks.shared.clock import median_ms

Forward = Callable[[Layer, Tensor, Tensor], Tensor]
CLOSE = 0.02  # of the norm: bf16 rounds each of a few steps by at most 0.004
CHECKED = 200  # tokens compared before anything is timed: experts with many rows, few and none


@dataclass(frozen=True, slots=True)
class Peer:
    """Another library's layer, ``forward(layer, x, logits)``."""

    version: str
    forward: Forward
    captured: bool = False  # in a CUDA graph: it never waits for the device
    trains: bool = False


def liger() -> Peer:
    """Its own grouped kernels; it routes in torch and reads the number of tiles on the host."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

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


PEERS: dict[str, Callable[[], Peer]] = {"vllm": vllm, "liger": liger, "sonic": sonic}


def reason(error: BaseException) -> str:
    """One line for ``not_run``."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def load(names: list[str], not_run: dict[str, str]) -> dict[str, Peer]:
    """Those of ``names`` that can be imported; of the others ``not_run`` says why."""
    found = {}
    for name in names:
        try:
            found[name] = PEERS[name]()
        except Exception as error:  # an import may fail in whatever way a library's start-up can
            not_run[name] = reason(error)
            print(f"{name} is not run: {not_run[name]}", flush=True)
    return found


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
        found = [layer.gradients(forward, CHECKED, 1) for forward in (layer.forward, bound(layer, peer))]
        for name, ours, theirs in zip(("tokens", "logits", "gate_up", "down"), *found, strict=True):
            errors[f"gradient of {name}"] = unlike(ours, theirs)
    for name, error in errors.items():
        if not error <= CLOSE:
            raise ValueError(f"its {name} is not ours: relative error {error:.3g}, of which {CLOSE} would be rounding")
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


def measure(
    layer: Layer,
    peers: dict[str, Peer],
    forward: tuple[int, ...],
    train: tuple[int, ...],
    seconds: float,
    not_run: dict[str, str],
) -> dict[str, Any]:
    """Figures of every peer for one shape: errors, µs and TFLOP/s of a forward, TFLOP/s of training. Each has its part
    of ``seconds``; what does not begin within it, and what fails, is in ``not_run``."""
    record: dict[str, Any] = {}
    shape = layer.shape
    for at, (name, peer) in enumerate(peers.items()):
        until = time.monotonic() + seconds / (len(peers) - at)
        began = time.monotonic()
        case: dict[str, Any] = {"version": peer.version, "captured": peer.captured, "forward": {}, "training": {}}
        work: list[tuple[str, Callable[[], None]]] = [("check", lambda c=case, p=peer: c.update(errors=check(layer, p)))]
        for tokens in sorted(forward, reverse=True):
            work.append((f"forward of {tokens}", lambda c=case, p=peer, n=tokens: _forward(c, layer, p, n)))
        for tokens in train if peer.trains else ():
            work.append((f"training on {tokens}", lambda c=case, p=peer, n=tokens: _train(c, layer, p, n)))
        for what, step in work:
            try:
                if time.monotonic() > until:
                    raise TimeoutError(f"no time left of its {until - began:.0f} s")
                step()
            except Exception as error:  # whatever a compiler, a tuner or a device may raise
                not_run[f"{name}, {shape.name}, {what}"] = reason(error)
                print(f"{name}, {shape.name}, {what} is not run: {reason(error)}", flush=True)
                if what == "check":
                    break
        seconds -= time.monotonic() - began
        record[name] = case
        print(f"{name} ({peer.version}), {shape.name}: {_line(case)}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return record


def _forward(case: dict[str, Any], layer: Layer, peer: Peer, tokens: int) -> None:
    us = forward_us(layer, peer, tokens)
    case["forward"][tokens] = {"us": us, "tflops": layer.shape.flops(tokens) / us / 1e6}


def _train(case: dict[str, Any], layer: Layer, peer: Peer, tokens: int) -> None:
    step = layer.step(bound(layer, peer), tokens, 0)
    step()
    ms = eager_ms([step], rounds=3)
    saved, peak = layer.memory(step)
    flops = 3 * layer.shape.flops(tokens)
    case["training"][tokens] = {"ms": ms, "tflops": flops / ms / 1e9, "saved_gib": saved, "peak_gib": peak}


def _line(case: dict[str, Any]) -> str:
    parts = [f"{what} {error:.4f}" for what, error in case.get("errors", {}).items()]
    parts += [f"{tokens}: {one['us']:.1f} us {one['tflops']:.0f} TFLOP/s" for tokens, one in case["forward"].items()]
    parts += [f"training {tokens}: {one['tflops']:.0f} TFLOP/s" for tokens, one in case["training"].items()]
    return "; ".join(parts) or "nothing"


