"""A rank lost in each stage of a run on several GPUs: who it was is said, nothing stays behind, and the run that goes
on with another number of GPUs ends with the weights and moments of one that nothing happened to.

    python -m benchmarks.faults.stages --run 4 --resume_on 2 --out FILE
    python -m benchmarks.faults.stages --run 2+2 --resume_on 4 1 --at_once    # on a CPU as well

A tiny model trains for a few steps, with a checkpoint after each: undisturbed, and once for every stage with a rank
that is killed in its midst (``benchmarks.faults.lose_rank``). The end must come by itself, within the deadline, and
name rank, host and pid. Exit 1 on a failure. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.faults.lose_rank import STAGES, STRUCK
from benchmarks.faults.ranks import NAMED
from benchmarks.multi_gpu.layouts import Layout
from benchmarks.shared.clock import machine
from benchmarks.shared.family import end_family, marked
from benchmarks.shared.options import out_file
from benchmarks.trainer.digests import of_checkpoint
from benchmarks.trainer.grpo_run import ACTOR, ROLLOUT, SHAPES, inputs, visible_gpus
from vexact.report.sinks.jsonl import read_metrics
from vexact.reward.sandbox.tree import kill_all

STEPS, LOST_IN = 4, 3
MARK = "VEXACT_FAULT_RUN"
AGENT = re.compile(r"^E\d+ .*torch/distributed/elastic", re.MULTILINE)
SAID = re.compile(rf"{STRUCK}([\d.]+)")
WENT_ON = re.compile(r"resuming after step (\d+)")


class Ended(NamedTuple):
    """A run that is over."""

    code: int | None  # None: it had to be ended
    output: str
    left: list[int]  # processes that lived on
    time: float


@dataclass(frozen=True, slots=True)
class Trial:
    """Runs of one configuration in directories below ``work``."""

    work: Path
    overrides: list[str]
    deadline_s: float

    def start(self, layout: Layout, directory: Path, program: list[str]) -> Ended:
        mark, log = uuid.uuid4().hex, self.work / f"{directory.name}_{layout.gpus}.log"
        environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(layout.gpus))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.gpus}"]
        line = [sys.executable, *(launcher if layout.gpus > 1 else []), "-m", *program, "train", *self.overrides]
        line += [*layout.overrides, f"trainer.default_local_dir={directory}"]
        with log.open("w") as output:
            process = subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                code: int | None = process.wait(self.deadline_s)
            except subprocess.TimeoutExpired:
                code = None
            ended, left = time.time(), _left(mark)
            end_family(process)
        kill_all(left)
        return Ended(code, log.read_text(errors="replace"), left, ended)

    def undisturbed(self, layout: Layout) -> dict[str, str]:
        """Digests of its end. Raises RuntimeError when it fails."""
        directory = self.work / "undisturbed"
        code, output, *_ = self.start(layout, directory, ["vexact"])
        if code != 0:
            raise RuntimeError(f"the undisturbed run: exit {code}: {_end(output)}")
        return of_checkpoint(directory)

    def lose(self, stage: str, layout: Layout) -> dict:
        """Loses a rank in a stage; what was said, how long the end took, and what is wrong with it."""
        rank = layout.gpus - 1 if stage == "generation" else layout.trainers - 1
        directory = self.work / stage.replace(" ", "_")
        program = ["benchmarks.faults.lose_rank", stage, str(LOST_IN), str(rank)]
        code, output, left, ended = self.start(layout, directory, program)
        struck = SAID.search(output)
        named = NAMED.search(output)
        found = {
            "rank": rank,
            "exit": code,
            "said": named and named[0],
            "ended_after_s": struck and round(ended - float(struck[1]), 1),
        }
        wrong = []
        if struck is None:
            wrong.append(f"no rank was lost: exit {code}: {_end(output)}")
        elif code is None:
            wrong.append(f"runs on {self.deadline_s:g} s after its start: {_end(output)}")
        elif code == 0 or named is None or not named[0].startswith(f"rank {rank} "):
            wrong.append(f"exit {code}, and rank {rank} is not named: {_end(output)}")
        if left:
            wrong.append(f"processes are left: {left}")
        return found | {"problems": wrong}

    def go_on(self, stage: str, layout: Layout, expected: dict[str, str]) -> dict:
        """The same command on other GPUs, to its end."""
        directory = self.work / stage.replace(" ", "_")
        code, output, left, _ = self.start(layout, directory, ["vexact"])
        went_on = WENT_ON.search(output)
        wrong = [f"processes are left: {left}"] if left else []
        if code != 0 or went_on is None:
            return {"problems": [*wrong, f"does not go on: exit {code}: {_end(output)}"]}
        if of_checkpoint(directory) != expected:
            wrong.append("other weights or moments than undisturbed")
        if [row["step"] for row in read_metrics(directory / "metrics.jsonl")] != list(range(1, STEPS + 1)):
            wrong.append("not one row per step")
        return {"after_step": int(went_on[1]), "problems": wrong}


def _left(mark: str) -> list[int]:
    """What is there a moment after the end."""
    deadline = time.monotonic() + 5
    while (found := marked(MARK, mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _end(output: str) -> str:
    """The last that the program said, without what torchrun's agent reports in its own way."""
    return "\n".join(AGENT.split(output)[0].splitlines()[-25:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Layout.parse, default=Layout(4), help="on which a rank is lost")
    parser.add_argument("--resume_on", type=Layout.parse, nargs="+", default=[Layout(2)], help="in turn, by stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--shape", choices=("tiny", "tiny-moe"), default="tiny")
    parser.add_argument("--at_once", action="store_true", help="all stages beside each other, on the same GPUs")
    parser.add_argument("--deadline_s", type=float, default=300, help="of each run")
    parser.add_argument("--work", type=Path, help="directory for runs and their output (default: a temporary one)")
    parser.add_argument("--out", type=out_file)
    parser.add_argument("more", nargs="*", metavar="key=value", help="overrides for every run")
    arguments = parser.parse_intermixed_args()
    if arguments.run.gpus < 2:
        parser.error("--run needs two GPUs at least: one has no rank to lose beside its driver")
    report = machine() | {"run": arguments.run.name, "resume_on": [each.name for each in arguments.resume_on]}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        overrides = [
            *inputs(SHAPES[arguments.shape], work, STEPS),
            f"{ROLLOUT}.kv_cache_bytes={1 << 28}",
            f"{ACTOR}.checkpoint.async_save=false",
            "trainer.save_freq=1",
            *arguments.more,
        ]
        trial = Trial(work, overrides, arguments.deadline_s)
        with ThreadPoolExecutor(1 + len(arguments.stages) if arguments.at_once else 1) as pool:
            undisturbed = pool.submit(trial.undisturbed, arguments.run)
            found = list(pool.map(lambda stage: trial.lose(stage, arguments.run), arguments.stages))
            expected = undisturbed.result()
            turns = [arguments.resume_on[i % len(arguments.resume_on)] for i in range(len(arguments.stages))]
            resumed = list(pool.map(lambda pair: trial.go_on(*pair, expected), zip(arguments.stages, turns)))
    report |= expected | {"stages": {}}
    for stage, lost, layout, after in zip(arguments.stages, found, turns, resumed, strict=True):
        report["stages"][stage] = lost | {"resumed_on": layout.name} | after
        report["stages"][stage]["problems"] = lost["problems"] + after["problems"]
        print(stage, json.dumps(report["stages"][stage]), flush=True)
    failures = [problem for stage in report["stages"].values() for problem in stage["problems"]]
    print(f"{len(report['stages'])} stages, failures: {len(failures)}", *failures, sep="\n")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
