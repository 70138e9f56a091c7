"""Whole GRPO steps on 1 and more GPUs, in both layouts: bits, weights, times, and how well the work spreads.

    python -m benchmarks.multi_gpu.steps --gpus 1 2 --layout colocated disaggregated --out multi_gpu_h100.json
    python -m benchmarks.multi_gpu.steps --shape qwen3-8b --gpus 2 --steps 2 --no_digest --out …
    python -m benchmarks.multi_gpu.steps --shape qwen3-30b-a3b --gpus 1 2 --expert_groups 1 2 --out …

Peer: the same work on one GPU. Every run is the ordinary trainer with the same global batch; figures come from its
metrics.jsonl, weights and moments from its last checkpoint. ``--launcher ray`` leaves the processes to the program.
Exit code 1: a run failed, a bit differed, or two layouts ended with other weights or moments.
``--expert_groups``: values of actor.fsdp_config.expert_parallel_size, for runs on so many GPUs.
``--shape tiny`` and ``tiny-moe`` run on a CPU in seconds. Further overrides stand at the end: ``key=value``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.shared.clock import machine
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.trainer.grpo_run import (
    ACTOR,
    SHAPES,
    figures,
    inputs,
    layout_overrides,
    state_digests,
    train,
    trainers,
)
from vexact.config import Config

STAGES = {"generation": "gen", "update": "update_actor", "sync": "update_weights", "step": "step"}


def efficiency(runs: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Of every colocated run beside the run on one GPU: time of one / (GPUs x time of several), by stage."""
    one = next((run for run in runs.values() if run["gpus"] == 1), None)
    several = {name: run for name, run in runs.items() if run["gpus"] > 1 and run["layout"] == "colocated"}
    if one is None:
        return {}
    return {
        name: {
            stage: round(one["seconds"][key] / (run["gpus"] * run["seconds"][key]), 4)
            for stage, key in STAGES.items()
            if stage != "sync"
        }
        for name, run in several.items()
    }


def problems(runs: dict[str, dict]) -> list[str]:
    """What is not as it must be."""
    found = [
        f"{name}: {run['tokens_different']} tokens differ" for name, run in runs.items() if run["tokens_different"]
    ]
    found += [f"{name}: {n} routes differ" for name, run in runs.items() if (n := run.get("routes_different", 0))]
    found += [f"{name}: no token was compared" for name, run in runs.items() if not run["tokens_compared"]]
    for key in ("weights_sha256", "moments_sha256"):
        digests = {name: run[key] for name, run in runs.items() if key in run}
        if len(set(digests.values())) > 1:
            found.append(f"{key} is not the same everywhere: {digests}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--layers", type=at_least_one, help="instead of the shape's own")
    parser.add_argument("--gpus", type=at_least_one, nargs="+", default=[1, 2])
    parser.add_argument("--layout", nargs="+", choices=("colocated", "disaggregated"), default=["colocated"])
    parser.add_argument("--expert_groups", type=int, nargs="+", default=[1])
    parser.add_argument("--launcher", choices=("torchrun", "ray"), default="torchrun")
    parser.add_argument("--steps", type=at_least_one, default=3)
    parser.add_argument("--no_digest", action="store_true", help="interrupt after the steps, save nothing")
    parser.add_argument("--timeout_s", type=float, default=900, help="of each run")
    parser.add_argument("--work", type=Path, help="directory for models and runs (default: a temporary one)")
    parser.add_argument("--out", type=out_file)
    parser.add_argument("more", nargs="*", metavar="key=value", help="overrides for every run")
    arguments = parser.parse_intermixed_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="vexact-multi-gpu-"))
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, raw=shape.raw | {"num_hidden_layers": arguments.layers})
    common = [*inputs(shape, work, arguments.steps), *arguments.more]
    report = machine() | {"shape": arguments.shape, "launcher": arguments.launcher, "overrides": arguments.more}
    report |= {
        "layers": shape.raw["num_hidden_layers"],
        "token_budget": shape.token_budget,
        "max_num_seqs": Config().rollout.max_num_seqs,
    }
    report |= {"runs": {}, "efficiency": {}, "problems": []}
    plans = [
        (gpus, layout, groups)
        for gpus in arguments.gpus
        for layout in arguments.layout
        for groups in arguments.expert_groups
        if (gpus > 1 or layout == "colocated") and trainers(gpus, layout) % groups == 0
    ]
    for gpus, layout, groups in plans:
        name = f"{gpus} {layout}" + (f", {groups} groups of experts" if groups > 1 else "")
        directory = work / name.replace(",", "").replace(" ", "-")
        try:
            run = train(
                gpus,
                arguments.launcher,
                [*common, *layout_overrides(gpus, layout), f"{ACTOR}.fsdp_config.expert_parallel_size={groups}"],
                directory,
                arguments.timeout_s,
                stop_after=arguments.steps if arguments.no_digest else None,
            )
        except RuntimeError as error:
            print(error)
            report["problems"].append(f"{name}: failed: {str(error).splitlines()[-1]}")
            continue
        report["runs"][name] = {"gpus": gpus, "layout": layout, "expert_groups": groups} | figures(run)
        if not arguments.no_digest:
            report["runs"][name] |= state_digests(directory)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        print(name, json.dumps(report["runs"][name]), flush=True)
    report["tokens_compared"] = sum(run["tokens_compared"] for run in report["runs"].values())
    report["efficiency"] = efficiency(report["runs"])
    report["problems"] += problems(report["runs"])
    print(json.dumps({key: report[key] for key in ("tokens_compared", "efficiency", "problems")}, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.work is None:
        shutil.rmtree(work)
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
