"""Step time and memory on 8 … 512 GPUs, from what is measured on 1 and 2 and from the bandwidths of links.

    python -m benchmarks.multi_gpu.scale_model          # tables, from the kept figures
    python -m benchmarks.multi_gpu.scale_model --check  # exit 1 if measured steps of several GPUs are not as predicted
    python -m benchmarks.multi_gpu.scale_model --check multi_gpu_8b_h100.json  # a larger model, from the smaller one

Weak scaling: every GPU keeps the sequences that the measured GPU had. Compute times are the measured ones, scaled by
floating-point operations (update) and by bytes read (generation). Added to them is what travels between GPUs, as far as
compute cannot hide it:

* weights gathered whole for every forward and backward, bf16;
* gradients, fp32: here an all-to-all of shards per round of micro-batches, summed by their index, so that the weights
  do not know the number of GPUs. Beside it a ring reduce-scatter, which adds partial sums in the ring's order. A GPU
  sends equally much either way, but of a ring only one link in eight leaves a node, and of an all-to-all all that goes
  to other nodes;
* new weights for the rollout, bf16, once a step.

"exactness" is the step with the all-to-all and no pass for old log-probabilities, over the step with the ring and that
pass. Models too large for one GPU's engine are taken to sample by column tensor parallelism over as many GPUs as hold
them; that, and mixtures of experts, are not built yet: their rows say what the network would cost.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from benchmarks.multi_gpu.scale_shapes import MODELS, ScaleModel
from vexact.config import load_config
from vexact.config.memory import Placement, memory_plan, size_text
from vexact.training.batches.packing import idle_share, pack

RESULTS = Path(__file__).parents[1] / "results"
GPUS_PER_NODE = 8
NVLINK = 205e9  # bytes/s a GPU sends: 100 MB of a reduce-scatter in 0.49 ms, measured on 2 H100 (18 links: 450e9)
NIC = 40e9  # bytes/s a GPU sends: one 400 Gbit/s port for each GPU (50e9, DGX H100 data sheet), 80 % of it in use
SUM = 4.5e12  # bytes/s of received shards summed in their order: 201 MB in 0.045 ms, measured on 2 H100
COLLECTIVE_S = 20e-6  # what starting one costs
FORWARD_SHARE = 0.25  # of an update with recomputed activations: forward, forward again, backward twice as long
NAMES = {"generation": "gen", "update": "update_actor", "sync": "update_weights"}
HIDDEN = 0.7  # share of an update's compute behind which its collectives can hide


@dataclass(frozen=True, slots=True)
class Measured:
    """One GPU's step in seconds, and the work in it; tokens are prompts and responses of all its sequences."""

    model: ScaleModel
    sequences: int
    prompt_tokens: int
    new_tokens: int
    token_budget: int
    concurrent: int  # sequences that decode at once
    generation: float
    update: float
    sync: float
    rest: float

    @property
    def tokens(self) -> int:
        return self.sequences * (self.prompt_tokens + self.new_tokens)

    def rounds(self, gpus: int) -> tuple[int, float]:
        """Rounds of micro-batches of an update when so many GPUs have this work each, and the share of them that is
        idle."""
        return _rounds(self.sequences * gpus, self.prompt_tokens + self.new_tokens, self.token_budget, gpus)


@lru_cache
def _rounds(sequences: int, length: int, budget: int, gpus: int) -> tuple[int, float]:
    lengths = [length] * sequences
    groups = pack(lengths, budget, balance=True)
    return math.ceil(len(groups) / gpus), idle_share(groups, lengths, gpus)


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds of a step, and the parts of it that only waiting for the network makes."""

    generation: float
    update: float
    sync: float
    rest: float
    gradients: float  # time on the wire, hidden or not, of one update
    gathers: float

    @property
    def step(self) -> float:
        return self.generation + self.update + self.sync + self.rest


def sent_to_one_node(gpus: int, size: float) -> tuple[float, float]:
    """Bytes a GPU sends within its node and out of it when each of ``gpus`` gets an equal share of ``size`` bytes."""
    near = min(gpus, GPUS_PER_NODE) - 1
    far = max(0, gpus - GPUS_PER_NODE)
    return size * near / gpus, size * far / gpus


def all_to_all(gpus: int, size: float) -> float:
    """Seconds: both links work at once, then the received pieces are summed."""
    if gpus == 1:
        return 0.0
    near, far = sent_to_one_node(gpus, size)
    return max(near / NVLINK, far / NIC) + size / SUM + COLLECTIVE_S


def ring(gpus: int, size: float) -> float:
    """Seconds of a reduce-scatter or all-gather of ``size`` bytes in rings, one for each GPU of a node.

    Every ring leaves a node once: of 8 GPUs' traffic, an eighth passes through all ports together.
    """
    if gpus == 1:
        return 0.0
    sent = size * (gpus - 1) / gpus
    out = sent / GPUS_PER_NODE / NIC if gpus > GPUS_PER_NODE else 0.0
    return max(sent / NVLINK, out) + COLLECTIVE_S


def predict(base: Measured, model: ScaleModel, gpus: int, *, exact: bool = True) -> Predicted:
    """A step of ``gpus`` GPUs with the measured sequences on each; not exact: a ring, and a pass for old log-probs."""
    flops = model.flops(base.tokens, base.prompt_tokens + base.new_tokens)
    rounds, idle = base.rounds(gpus)
    busy = base.update * flops / base.model.flops(base.tokens, base.prompt_tokens + base.new_tokens)
    parameters = model.shape.num_parameters
    gather = ring(gpus, 2 * parameters)
    reduce = all_to_all(gpus, 4 * parameters) if exact else ring(gpus, 4 * parameters)
    compute = busy / (1.0 - idle)
    gathers, gradients = rounds * 2 * gather, rounds * reduce
    update = compute + max(0.0, gathers + gradients - HIDDEN * compute)
    recompute = 0.0 if exact else FORWARD_SHARE * compute + max(0.0, gathers / 2 - HIDDEN * FORWARD_SHARE * compute)
    generation = base.generation * model.decode_bytes(base) / base.model.decode_bytes(base)
    generation += _gathered_activations(base, model)
    sync = base.sync * parameters / base.model.shape.num_parameters + gather
    return Predicted(generation, update + recompute, sync, base.rest, gradients, gathers)


def _gathered_activations(base: Measured, model: ScaleModel) -> float:
    """Column tensor parallelism gathers activations before two products of each layer, in every decode step."""
    parts = model.tensor_parallel
    if parts == 1:
        return 0.0
    rounds = math.ceil(base.sequences * parts / base.concurrent)
    size = 2 * base.concurrent * (model.shape.num_heads * model.shape.head_dim + model.active_intermediate)
    one = size * (parts - 1) / parts / NVLINK + 2 * COLLECTIVE_S
    return rounds * base.new_tokens * model.shape.num_layers * one


def read_measured(path: Path, run: str, model: ScaleModel) -> Measured:
    """One run of ``steps.py``. Raises SystemExit with what to measure when it is not there."""
    report = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    if run not in report["runs"]:
        command = f"python -m benchmarks.multi_gpu.steps --gpus 1 2 --out {path}"
        raise SystemExit(f"{path} has no run {run!r}; first run {command}")
    work = report["runs"][run]
    seconds, parts = work["seconds"], {key: work["seconds"][name] for key, name in NAMES.items()}
    sequences = work["tokens_sampled"] / work["steps"] / work["response_tokens"] / work["gpus"]
    return Measured(
        model=model,
        sequences=round(sequences),
        prompt_tokens=round(work["prompt_tokens"]),
        new_tokens=round(work["response_tokens"]),
        token_budget=report["token_budget"],
        concurrent=report["max_num_seqs"],
        rest=seconds["step"] - sum(parts.values()),
        **parts,
    )


def at(base: Measured, work: Measured) -> Measured:
    """The measured GPU with the sequences of ``work``: generation by the bytes it reads, update by its operations."""
    same = {
        name: getattr(work, name) for name in ("sequences", "prompt_tokens", "new_tokens", "token_budget", "concurrent")
    }
    moved, lengths = replace(base, **same), [w.prompt_tokens + w.new_tokens for w in (work, base)]
    flops = [base.model.flops(w.tokens, length) for w, length in zip((work, base), lengths, strict=True)]
    return replace(
        moved,
        generation=base.generation * base.model.decode_bytes(moved) / base.model.decode_bytes(base),
        update=base.update * flops[0] / flops[1],
    )


def check(one: Measured, several: Measured, gpus: int, tolerance: float) -> list[str]:
    """How a run on ``gpus`` GPUs differs from what one GPU's run predicts: lines that exceed ``tolerance``.

    The measured runs share one global batch, so a GPU of several has fewer sequences than a lone one.
    """
    predicted = predict(at(one, several), several.model, gpus)
    lines = []
    for stage in ("generation", "update", "step"):
        step = several.generation + several.update + several.sync + several.rest
        measured = step if stage == "step" else getattr(several, stage)
        ratio = getattr(predicted, stage) / measured
        times = f"predicted {getattr(predicted, stage):.3f} s, measured {measured:.3f} s, ratio {ratio:.3f}"
        line = f"{gpus} GPUs, {stage}: {times}"
        print(line)
        if abs(ratio - 1) > tolerance:
            lines.append(f"{line}: more than {tolerance:.0%} apart")
    return lines


def check_file(one: Measured, path: Path, tolerance: float) -> int:
    """All colocated runs of a report on several GPUs; an exit code."""
    report = json.loads(path.read_text())
    runs = {name: run for name, run in report["runs"].items() if run["layout"] == "colocated" and run["gpus"] > 1}
    if not runs or report["shape"] not in MODELS:
        raise SystemExit(f"{path} has no colocated run on several GPUs of a shape that is known: {', '.join(MODELS)}")
    wrong = []
    for name, run in sorted(runs.items(), key=lambda item: item[1]["gpus"]):
        wrong += check(one, read_measured(path, name, MODELS[report["shape"]]), run["gpus"], tolerance)
    print("\n".join(wrong) or f"the measured steps are within {tolerance:.0%} of the predicted ones")
    return 1 if wrong else 0


def memory(model: ScaleModel, gpus: int) -> str:
    """Of the stage that needs most, offloading nothing; "-" where no tensor-parallel engine exists to hold it."""
    config = load_config(["data.max_prompt_length=512", "data.max_response_length=1024"], checked=False)
    plan = memory_plan(config, model.shape, Placement(gpus, gpus, True), "cuda")
    spared = 2 * model.shape.num_parameters * (1 - 1 / model.tensor_parallel)
    return size_text(int(max(stage.total for stage in plan.stages) - spared))


def tables(base: Measured, gpu_counts: list[int]) -> str:
    lines = [
        f"{'model':<18}{'GPUs':>5}{'TP':>4}{'generation':>12}{'update':>9}{'sync':>8}{'step':>9}"
        f"{'all-to-all':>12}{'ring':>8}{'exactness':>11}{'memory':>11}"
    ]
    for name, model in MODELS.items():
        for gpus in gpu_counts:
            exact, other = predict(base, model, gpus), predict(base, model, gpus, exact=False)
            lines.append(
                f"{name:<18}{gpus:>5}{model.tensor_parallel:>4}{exact.generation:>12.1f}{exact.update:>9.1f}"
                f"{exact.sync:>8.2f}{exact.step:>9.1f}{exact.gradients:>12.2f}{other.gradients:>8.2f}"
                f"{exact.step / other.step:>10.2f}x{memory(model, gpus):>11}"
            )
    return "\n".join(lines)


def costs(base: Measured, gpu_counts: list[int]) -> str:
    """Where exactness costs time, and where it saves some."""
    lines = []
    for name, model in MODELS.items():
        ratios = {
            gpus: predict(base, model, gpus).step / predict(base, model, gpus, exact=False).step for gpus in gpu_counts
        }
        dear = [f"{gpus} GPUs {ratio - 1:+.0%}" for gpus, ratio in ratios.items() if ratio > 1]
        spared = 1 - max(ratio for ratio in ratios.values())
        lines.append(
            f"{name}: " + (f"exactness costs on {', '.join(dear)}" if dear else f"saves at least {spared:.0%}")
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "multi_gpu_h100.json")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--check", type=Path, nargs="?", const=RESULTS / "multi_gpu_h100.json", metavar="REPORT")
    parser.add_argument("--tolerance", type=float, default=0.15)
    arguments = parser.parse_args()
    model = MODELS["qwen3-1.7b"]
    one = read_measured(arguments.measured, "1 colocated", model)
    if arguments.check is not None:
        return check_file(one, arguments.check, arguments.tolerance)
    print(f"seconds; {one.sequences} sequences of {one.prompt_tokens} + {one.new_tokens} tokens on every GPU")
    print(tables(one, arguments.gpus))
    print(costs(one, arguments.gpus))
    print("fewer, larger micro-batches (ppo_max_token_len_per_gpu) send less: gradients travel once per round of them")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
