"""The whole step on one GPU, exact and not: what exactness costs, and what it saves.

    python -m benchmarks.trainer.step_cost --out benchmarks/results/step_cost_h100.json

* ``exact``: as it is; the rollout's log-probabilities are the old ones.
* ``recompute``: the same with ``algorithm.recompute_old_log_prob=true``, the pass that everyone else pays.
* ``stock``: torch's operators in the rollout (``batch_invariant=false``: cuBLAS, pointwise operators fused by torch's
  compiler, paged FlashAttention where one is installed, CUDA graphs), stock attention in the trainer, the recomputed
  pass, no comparison. Its trainer keeps this project's other operators. The report and the line below the table say
  which attention the rollout of each run really had: on torch 2.11 without the package flash_attn it is this project's.

Same model, prompts and number of tokens; a table of step parts (medians, the first step left out). The net cost of
exactness is the exact step over the peers'. Runs are interrupted after their steps and save nothing. ``--shape tiny``
runs on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.shared.clock import machine
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.trainer.grpo_run import ACTOR, ROLLOUT, SHAPES, TIMES, figures, inputs, train

RECOMPUTE = ("algorithm.recompute_old_log_prob=true",)


def variants() -> dict[str, tuple[str, ...]]:
    stock = "flash_attention_2" if torch.cuda.is_available() else "sdpa"
    return {
        "exact": (),
        "recompute": RECOMPUTE,
        "stock": (
            *RECOMPUTE,
            f"{ROLLOUT}.batch_invariant=false",
            f"{ACTOR}.attn_implementation={stock}",
            "trainer.exactness=off",
        ),
    }


def net_cost(runs: dict[str, dict]) -> dict[str, dict[str, float]]:
    """The exact run over every peer: seconds more (negative: saved) and the ratio of the steps."""
    exact = runs["exact"]["seconds"]
    return {
        name: {
            f"{part}_s": round(exact.get(part, 0.0) - run["seconds"].get(part, 0.0), 4)
            for part in TIMES
            if part in exact or part in run["seconds"]
        }
        | {"step_ratio": round(exact["step"] / run["seconds"]["step"], 4)}
        for name, run in runs.items()
        if name != "exact"
    }


def table(runs: dict[str, dict]) -> str:
    """Step parts in seconds, a column per run; "rest" is what no named part covers (the audit is within the update)."""
    lines = [f"{'part':<16}" + "".join(f"{name:>12}" for name in runs)]
    for part in TIMES:
        cells = [run["seconds"].get(part) for run in runs.values()]
        lines.append(f"{part:<16}" + "".join(f"{'-' if cell is None else format(cell, '.3f'):>12}" for cell in cells))
    rest = [
        run["seconds"]["step"] - sum(value for part, value in run["seconds"].items() if part not in ("step", "audit"))
        for run in runs.values()
    ]
    return "\n".join([*lines, f"{'rest':<16}" + "".join(f"{value:>12.3f}" for value in rest)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--runs", nargs="+", choices=variants(), default=list(variants()))
    parser.add_argument("--steps", type=at_least_one, default=4)
    parser.add_argument("--timeout_s", type=float, default=900, help="of each run")
    parser.add_argument("--out", type=out_file)
    parser.add_argument("more", nargs="*", metavar="key=value", help="overrides for every run")
    arguments = parser.parse_intermixed_args()
    work = Path(tempfile.mkdtemp(prefix="vexact-step-cost-"))
    common = [*inputs(SHAPES[arguments.shape], work, arguments.steps), *arguments.more]
    report = machine() | {"shape": arguments.shape, "overrides": arguments.more, "runs": {}}
    for name in arguments.runs:
        overrides = [*common, *variants()[name]]
        run = train(1, "torchrun", overrides, work / name, arguments.timeout_s, stop_after=arguments.steps)
        report["runs"][name] = figures(run)
        shutil.rmtree(work / name)
        print(name, json.dumps(report["runs"][name]), flush=True)
    print(table(report["runs"]))
    for name, run in report["runs"].items():
        ratio = run["graph_ratio"]
        print(f"{name}: rollout attention: {run['attention']}; {ratio:.0%} of its steps in CUDA graphs")
    if "exact" in report["runs"]:
        report["exact_over"] = net_cost(report["runs"])
        print(json.dumps(report["exact_over"], indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(work)
    exact = [run for name, run in report["runs"].items() if name != "stock"]
    return 1 if any(run["tokens_different"] or not run["tokens_compared"] for run in exact) else 0


if __name__ == "__main__":
    raise SystemExit(main())
