"""The trainer's forward and backward of one micro-batch beside compiled stock operators on the same weights and tokens.

    python -m benchmarks.trainer.forward_backward --out benchmarks/results/forward_backward_h100.json

Qwen3-1.7B shapes with random bf16 weights, 16k tokens as 2 x 8k and as 8 x 2k, all of them with a policy loss; no
optimizer, no fp32 copy of the weights. ``kept``: all activations are kept for the backward; ``again``: layers are
computed again in it, as where memory is short (``recompute_num_layers``). It is the same on both sides.

* ``triton``, ``specialised``: what the actor calls, with the warp-specialised attention of sm_90 off and on. Their
  log-probabilities and gradients must be the same bits. A line says which of the two is chosen unasked; where it is
  neither, ``as it is`` is measured too.
* ``flash``, ``cudnn``: ``Qwen3ForCausalLM`` of transformers under ``torch.compile`` (cuBLAS, pointwise operators
  fused), attention by FlashAttention-2 or cuDNN through SDPA, log-probabilities of fp32 logits without an entropy. It
  is timed where log-probabilities and gradients are ours but for rounding and its attention is the one named; what
  fails is in ``not_run`` with the reason.

Sides take turns; medians of CUDA events. The ratios are a peer's time over ours. MFU is counted as ``perf/mfu/actor``
of the trainer, where nothing that is computed again counts. After --seconds no case, peer or round is begun. Exit code
1 on a different bit. ``--shape tiny`` is a rehearsal for a CPU: nothing is compiled to kernels, and cuDNN does not run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.clock import environment
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.trainer.forward_backward_sides import (
    MicroBatch,
    Ours,
    attention_form,
    attention_forms,
    micro_batch,
    random_weights,
    specialised_passes,
)
from benchmarks.trainer.forward_backward_stock import ATTENTION, Stock, attention_run
from benchmarks.trainer.forward_backward_turns import Side
from benchmarks.trainer.grpo_run import TINY
from vexact.device import resolve_device
from vexact.models import CausalLM
from vexact.models.flops import training_flops
from vexact.prepare.shapes import SHAPES
from vexact.trainer.workers.peak_flops import peak_flops

CASES = {
    "tiny": (TINY, {"2 x 24": [24] * 2, "6 x 8": [8] * 6}),
    "qwen3-1.7b": (SHAPES["qwen3-1.7b"], {"2 x 8k": [8192] * 2, "8 x 2k": [2048] * 8}),
}
MODES = {"kept": False, "again": True}
LARGEST_ERRORS = {"logprobs": 0.1, "gradients": 0.2}
"""Relative. Rounding to bf16 in 28 layers makes 0.012 and 0.016, attention without positions 0.22 and 0.39."""


class NotThePeer(ValueError):
    """It computes something else."""


def measure(
    ours: Ours, stock: Stock | str, work: MicroBatch, recompute: bool, rounds: int, is_over: Callable[[], bool]
) -> dict:
    """One case: bits, agreement, times. ``stock`` may be the reason why there are no peers."""
    device, forms = work.tokens.device, attention_forms()[0]
    record: dict[str, Any] = {"sides": {}, "not_run": {}}
    call = partial(ours.forward_backward, work, recompute)
    sides = {
        name: Side(call, ours.gradients, ours.release, partial(attention_form, passes))
        for name, passes in forms.items()
    }
    logprobs, gradients = _same_bits(sides, work, ours, record)
    for name in ATTENTION:
        if isinstance(stock, str):
            record["not_run"][name] = stock
            continue
        peer = Side(partial(stock.forward_backward, work, recompute, name), stock.gradients, stock.release)
        with _may_fail(name, record, stock.release):
            if is_over():
                raise TimeoutError("the time was up")
            record["sides"][name] = _agreement(peer, name, logprobs, gradients, device)
            sides[name] = peer
    del gradients
    for number in range(rounds):
        if number and is_over():
            break
        for name, side in list(sides.items()):
            with nullcontext() if name in forms else _may_fail(name, record, side.release):
                record["sides"][name]["peak_gib"] = side.turn(device)
            if name in record["not_run"]:
                del sides[name], record["sides"][name]
    for name, side in sides.items():
        record["sides"][name] |= {"ms": round(median(side.times), 3), "all_ms": [round(ms, 3) for ms in side.times]}
    return record


def _same_bits(sides: dict[str, Side], work: MicroBatch, ours: Ours, record: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """What our first form gives, which the others must give too."""
    device, compared = work.tokens.device, {"values": 0, "logprobs_different": 0, "gradients_different": 0}
    found: tuple[Tensor, dict[str, Tensor]] | None = None
    for name, side in sides.items():
        logprobs, gradients, seconds = side.first(device)
        with side.form():
            record["sides"][name] = {"first_s": seconds, "specialised": specialised_passes(ours.model, work)}
        if found is None:
            found = logprobs, gradients
            compared["rollout_different"] = different_bits(logprobs, work.targets.old_logprobs)
            continue
        compared["values"] += len(logprobs) + sum(grad.numel() for grad in gradients.values())
        compared["logprobs_different"] += different_bits(logprobs, found[0])
        compared["gradients_different"] += sum(different_bits(grad, found[1][key]) for key, grad in gradients.items())
    assert found is not None, "there is a form"
    record["bits"] = compared
    return found


def _agreement(side: Side, name: str, logprobs: Tensor, gradients: dict[str, Tensor], device: torch.device) -> dict:
    """Compiles a peer and compares it with ours.

    Raises:
        NotThePeer: its results are not ours but for rounding, or another attention runs.
    """
    own, grads, seconds = side.first(device)
    errors = {"logprobs": relative_error(own, logprobs), "gradients": gradient_error(grads, gradients)}
    largest = float((own - logprobs).abs().max())
    del own, grads
    for what, error in errors.items():
        if not error <= LARGEST_ERRORS[what]:
            raise NotThePeer(f"its {what} are not ours: relative error {error:.3g}")
    attention = attention_run(side.call)
    side.release()
    if not all(f"_{name}_attention" in operator for operator in attention):
        raise NotThePeer(f"its attention is {' and '.join(attention)}")
    return {"first_s": seconds, "errors": errors, "largest_logprob_difference": largest, "attention": attention}


@contextmanager
def _may_fail(name: str, record: dict, release: Callable[[], None]) -> Iterator[None]:
    """Keeps the reason; whatever a peer cannot do stops no other side."""
    try:
        yield
    except Exception as error:
        record["not_run"][name] = reason(error)
    else:
        return
    release()
    gc.collect()


def reason(error: Exception) -> str:
    """The cause behind all others, in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:1000] or 'no word'}"


def _stock(model: CausalLM, backend: str) -> Stock | str:
    try:
        return Stock(model, backend)
    except Exception as error:
        return reason(error)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """Of differences, over the spread of what is wanted."""
    wanted = wanted.double()
    return float((given.double() - wanted).norm() / (wanted - wanted.mean()).norm())


def gradient_error(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of all differences over that of all gradients; infinite where others are there."""
    if set(given) != set(wanted):
        return math.inf
    sums = [
        torch.stack([(given[name].float() - grad.float()).square().sum(), grad.float().square().sum()]).double()
        for name, grad in wanted.items()
    ]
    difference, whole = torch.stack(sums).sum(0).tolist()
    return math.sqrt(difference / whole) if whole > 0 else math.inf


def different_bits(one: Tensor, other: Tensor) -> int:
    """Values of the same shape and dtype that are not the same bit for bit."""
    words = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return int((one.view(words) != other.view(words)).sum())


def add_ratios(record: dict, flops: int, peak: float | None) -> None:
    """MFU of every side, and every peer's time over each of ours."""
    sides = record["sides"]
    for side in sides.values():
        side["mfu"] = None if peak is None else round(flops / (1e-3 * side["ms"] * peak), 4)
    record["ratios"] = {
        name: {peer: round(sides[peer]["ms"] / side["ms"], 4) for peer in ATTENTION if peer in sides}
        for name, side in sides.items()
        if name not in ATTENTION
    }


def table(record: dict) -> str:
    """A line per side: milliseconds, MFU, what the peers take over it, and what is to be known of it."""
    title, lines = f"{record['case']}, {record['mode']}", []
    for name, side in record["sides"].items():
        mfu = "-" if side["mfu"] is None else f"{side['mfu']:.1%}"
        ratios = "".join(f"{peer} / it {ratio:6.3f}  " for peer, ratio in record["ratios"].get(name, {}).items())
        if "errors" in side:
            told = "differs by " + ", ".join(f"{error:.2g} ({what})" for what, error in side["errors"].items())
        else:
            told = f"specialised: {', '.join(side['specialised']) or 'nothing'}"
        memory = "" if side["peak_gib"] is None else f"{side['peak_gib']:5.1f} GiB  "
        first = f"first {side['first_s']} s"
        lines.append(f"{title:<15}{name:<12}{side['ms']:9.2f} ms  MFU {mfu:>6}  {memory}{ratios}{told}; {first}")
    lines += [f"{title}: {name} NOT RUN: {shorten(why, 240)}" for name, why in record["not_run"].items()]
    bits = record["bits"]
    different = f"{bits['logprobs_different']} log-probabilities, {bits['gradients_different']} values of gradients"
    lines.append(f"  {bits['values']:,} values of our forms compared; different: {different}")
    return "\n".join(lines)


def is_different(record: dict) -> bool:
    return any(count for name, count in record["bits"].items() if name.endswith("_different"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CASES, default="qwen3-1.7b")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--seconds", type=float, default=130)
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    import transformers

    deadline = time.monotonic() + arguments.seconds
    device = torch.device(resolve_device("auto"))
    raw, cases = CASES[arguments.shape]
    on_gpu = device.type == "cuda"
    model = random_weights(raw, device, torch.bfloat16 if on_gpu else torch.float32)
    ours, stock = Ours(model), _stock(model, "inductor" if on_gpu else "aot_eager_decomp_partition")
    peak = peak_flops(device, "bfloat16")
    report: dict[str, Any] = environment() | {"transformers": transformers.__version__, "shape": arguments.shape}
    report |= {"as_it_is": attention_forms()[1], "peak_flops": peak, "cases": [], "left_out": []}
    print(f"attention as it is: {report['as_it_is']}", flush=True)
    for mode in arguments.modes:
        for case, lengths in cases.items():
            if time.monotonic() > deadline:
                report["left_out"].append(f"{case}, {mode}")
                print(f"{case}, {mode}: NOT RUN: {arguments.seconds:g} s are over")
                continue
            work = micro_batch(model, lengths)
            record = {"case": case, "mode": mode, "tokens": sum(lengths)}
            record |= {"flops": training_flops(model.config, work.lengths)}
            record |= measure(ours, stock, work, MODES[mode], arguments.rounds, lambda: time.monotonic() > deadline)
            add_ratios(record, record["flops"], peak)
            report["cases"].append(record)
            print(table(record), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(map(is_different, report["cases"])) else 0


if __name__ == "__main__":
    raise SystemExit(main())
