"""GRPO steps on one and several GPUs: no bit differs, weights are the same, and where the time goes.

    python -m benchmarks.multi_gpu.steps --out multi_gpu_h100.json
    python -m benchmarks.multi_gpu.steps --runs 1 2 4 --digest memory --out multi_gpu_h100_x4.json
    python -m benchmarks.multi_gpu.steps --shape qwen3-8b --runs 4 2+2 2+2,async 2 --digest memory --out …
    python -m benchmarks.multi_gpu.steps --shape qwen3-30b-a3b --runs 1 2 --expert_groups 1 2 --out …

A run is ``4`` (four colocated GPUs), ``3+1`` (three train, one samples) or ``2+2,async`` (the same one step off).

Peer: the same work on one GPU. Every run is the ordinary trainer with the same global batch; figures come from its
metrics.jsonl, weights and moments from its last checkpoint, or with ``--digest memory`` from memory
(``benchmarks.trainer.unsaved``). ``--launcher ray`` leaves the processes to the program. What is offloaded, and whether
the rollout sleeps, is what the memory plan needs. Exit code 1: a run failed, a bit differed, or two layouts ended with
other weights or moments: all must have the same, but for those that are one step off.
``--expert_groups``: values of actor.fsdp_config.expert_parallel_size, for runs on so many GPUs.
``--keep`` leaves the model in --work to the next call; CUDA_VISIBLE_DEVICES says which GPUs are taken, so that two
calls can share a machine. ``--shape tiny`` and ``tiny-moe`` run on a CPU in seconds. Further overrides stand at the
end: ``key=value``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.multi_gpu.layouts import Layout
from benchmarks.multi_gpu.offload import least_offload
from benchmarks.shared.clock import machine
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.trainer import digests, unsaved
from benchmarks.trainer.grpo_run import ACTOR, SHAPES, OutOfTime, figures, inputs, train
from vexact.config import load_config
from vexact.config.memory import Machine

STAGES = {"generation": "gen", "update": "update_actor", "step": "step"}
LEAST_S = 20.0  # in which no run can do anything
CONTEXT_BYTES = 1 << 30  # that is never free on a GPU


def efficiency(runs: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Of every colocated run beside the one on fewest GPUs, by stage: GPU-seconds of that one over its own."""
    whole = {name: run for name, run in runs.items() if "unfinished" not in run}
    colocated = {name: run for name, run in whole.items() if run["layout"] == "colocated"}
    base = min(colocated.values(), key=lambda run: run["gpus"], default=None)
    if base is None:
        return {}
    return {
        name: {
            stage: round(base["gpus"] * base["seconds"][key] / (run["gpus"] * run["seconds"][key]), 4)
            for stage, key in STAGES.items()
        }
        for name, run in colocated.items()
        if run["gpus"] > base["gpus"]
    }


def problems(runs: dict[str, dict]) -> list[str]:
    """What is not as it must be."""
    found = [
        f"{name}: {run['tokens_different']} tokens differ" for name, run in runs.items() if run["tokens_different"]
    ]
    found += [f"{name}: {n} routes differ" for name, run in runs.items() if (n := run.get("routes_different", 0))]
    found += [f"{name}: {run['unfinished']}" for name, run in runs.items() if "unfinished" in run]
    found += [f"{name}: no token was compared" for name, run in runs.items() if not run["tokens_compared"]]
    for key in ("weights_sha256", "moments_sha256"):
        for ahead in (False, True):
            same = {name: run for name, run in runs.items() if (run["layout"] == "one step off") == ahead}
            held = {name: run[key] for name, run in same.items() if key in run}
            if len(set(held.values())) > 1:
                found.append(f"{key} is not the same everywhere: {held}")
    return found


def this_machine(gpus: int) -> Machine:
    if not torch.cuda.is_available():
        return Machine("cpu", gpus)
    return Machine("cuda", gpus, torch.cuda.get_device_properties(0).total_memory - CONTEXT_BYTES)


def measured(
    layout: Layout,
    groups: int,
    overrides: list[str],
    directory: Path,
    timeout_s: float,
    arguments: argparse.Namespace,
) -> dict:
    """Figures of one run, ``unfinished`` where its time was up after a step or later. RuntimeError: it failed."""
    more = [*layout.overrides, f"{ACTOR}.fsdp_config.expert_parallel_size={groups}"]
    offload = least_offload([*overrides, *more, *arguments.more], this_machine(layout.gpus))
    unfinished = {}
    try:
        run = train(
            layout.gpus,
            arguments.launcher,
            [*overrides, *more, *offload, *arguments.more],
            directory,
            timeout_s,
            stop_after=arguments.steps if arguments.digest == "none" else None,
            program="vexact" if arguments.digest == "checkpoint" else "benchmarks.trainer.unsaved",
        )
    except OutOfTime as stopped:
        run, unfinished = stopped.run, {"unfinished": str(stopped)}
    found = {"gpus": layout.gpus, "layout": layout.kind, "rollout_gpus": layout.rollouts, "expert_groups": groups}
    found |= {"offload": [key for key in offload if key.endswith("=true")], **figures(run), **unfinished}
    if unfinished:
        return found
    if arguments.digest == "checkpoint":
        found |= digests.of_checkpoint(directory)
    elif arguments.digest == "memory":
        found |= unsaved.read(directory)
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--layers", type=at_least_one, help="instead of the shape's own")
    parser.add_argument("--runs", "--gpus", type=Layout.parse, nargs="+", default=[Layout(1), Layout(2)])
    parser.add_argument("--expert_groups", type=int, nargs="+", default=[1])
    parser.add_argument("--launcher", choices=("torchrun", "ray"), default="torchrun")
    parser.add_argument("--steps", type=at_least_one, default=3)
    parser.add_argument("--digest", choices=("checkpoint", "memory", "none"), default="checkpoint")
    parser.add_argument("--no_digest", dest="digest", action="store_const", const="none", help="as --digest none")
    parser.add_argument("--timeout_s", type=float, default=900, help="of each run")
    parser.add_argument(
        "--total_s", type=float, default=math.inf, help="of all; a run that finds none left is left out"
    )
    parser.add_argument("--work", type=Path, help="directory for models and runs (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the model in --work, and take one that is there")
    parser.add_argument("--only_model", action="store_true", help="write the model to --work and end")
    parser.add_argument("--out", type=out_file)
    parser.add_argument("more", nargs="*", metavar="key=value", help="overrides for every run")
    arguments = parser.parse_intermixed_args()
    if arguments.digest == "memory" and arguments.launcher == "ray":
        parser.error("--digest memory needs --launcher torchrun: Ray's workers are processes of vexact itself")
    if (arguments.keep or arguments.only_model) and arguments.work is None:
        parser.error("--keep and --only_model need --work, where the model is to stay")
    return arguments


def main() -> int:
    started, arguments = time.monotonic(), parsed()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="vexact-multi-gpu-"))
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, raw=shape.raw | {"num_hidden_layers": arguments.layers})
    if not arguments.keep:
        shutil.rmtree(work / "model", ignore_errors=True)
    common = inputs(shape, work, arguments.steps)
    if arguments.only_model:
        return 0
    report = machine() | {"shape": arguments.shape, "launcher": arguments.launcher, "overrides": arguments.more}
    config = load_config([*common, *arguments.more], checked=False)
    report |= {
        "layers": shape.raw["num_hidden_layers"],
        "token_budget": config.actor.ppo_max_token_len_per_gpu,
        "max_num_seqs": config.rollout.max_num_seqs,
    }
    report |= {"runs": {}, "efficiency": {}, "problems": []}
    plans = [
        (run, groups) for run in arguments.runs for groups in arguments.expert_groups if run.trainers % groups == 0
    ]
    for layout, groups in plans:
        name = layout.name + (f", {groups} groups of experts" if groups > 1 else "")
        directory = work / name.replace(",", "").replace(" ", "-")
        shutil.rmtree(directory, ignore_errors=True)  # a run that is there would be gone on with
        left = started + arguments.total_s - time.monotonic()
        if left < LEAST_S:
            report["problems"].append(f"{name}: not run: no time was left")
            continue
        try:
            report["runs"][name] = measured(
                layout, groups, common, directory, min(left, arguments.timeout_s), arguments
            )
        except RuntimeError as error:
            print(error)
            said = [line for line in str(error).splitlines() if line and not line.startswith("(--debug")]
            report["problems"].append(f"{name}: failed: {said[-1]}")
            continue
        finally:
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
            _write(report, arguments.out)  # what is measured stays, whatever becomes of the next run
        print(name, json.dumps(report["runs"][name]), flush=True)
    report["tokens_compared"] = sum(run["tokens_compared"] for run in report["runs"].values())
    report["efficiency"] = efficiency(report["runs"])
    report["problems"] += problems(report["runs"])
    print(json.dumps({key: report[key] for key in ("tokens_compared", "efficiency", "problems")}, indent=2))
    _write(report, arguments.out)
    if arguments.work is None:
        shutil.rmtree(work)
    return 1 if report["problems"] else 0


def _write(report: dict, out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
