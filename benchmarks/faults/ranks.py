"""Kills at random moments of runs on several ranks: is it said who was lost, what stays behind, is the result the same?

    python -m benchmarks.faults.ranks --faults 30
    python -m benchmarks.faults.ranks --faults 30 --launchers ray torchrun --async-save

A tiny model trains for a few steps on one process, undisturbed. Then runs of the same are disturbed until they are
done. Every attempt starts on another launcher, drawn anew: one process, two ranks of torchrun, two workers under Ray.
At a random moment SIGKILL goes to one of its ranks, to its driver or launcher, or to all its processes, or, once a step
is reported, SIGSTOP to a worker. The end must come by itself, within the deadline of a stage; a lost worker must be
named with rank, host and pid, without a traceback of ours; no process may be left; and the weights and moments at the
end of each run must have the SHA-256 of the undisturbed one, with one row per step. Prints the counts; exit 1 on a
failure. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.faults.kills import STEPS, Outcome, Runs, adopt_orphans, survivors
from vexact.report.sinks.jsonl import read_metrics
from vexact.reward.sandbox.tree import descendants, kill_all
from vexact.trainer.checkpoint import load_checkpoint

STAGE_S = 6.0  # trainer.worker_timeout_s
DEADLINE_S = 60.0  # for all processes to end, on a busy machine
LAUNCHERS = {
    "one process": ["-m", "vexact"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vexact"],
    "ray": ["-m", "vexact"],
}
NAMED = re.compile(r"rank \d \(host [^ ]+, pid (\d+)\) (died|hangs) in [\w ]+: ")


class RankRuns(Runs):
    """Runs that are started with another launcher at every attempt."""

    def __init__(self, work: Path, launchers: list[str], *more: str) -> None:
        self.launchers, self.launcher = launchers, "one process"
        self.log = work / "output.txt"
        super().__init__(work, f"trainer.worker_timeout_s={STAGE_S}", *more)

    def start(self) -> subprocess.Popen[str]:
        further = ["trainer.n_gpus_per_node=2"] if self.launcher == "ray" else []
        options = [*self.options, *further, f"trainer.default_local_dir={self.directory}"]
        command = [sys.executable, *LAUNCHERS[self.launcher], "train", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)

    def result(self) -> tuple[str, list[dict[str, object]]]:
        """SHA-256 of the weights and moments at the end, and the steps that were reported."""
        _, state = load_checkpoint(self.directory / "checkpoints" / f"step_{STEPS}")
        digest = hashlib.sha256()
        for name, saved in sorted(state["parameters"].items()):
            for key in ("weight", "exp_avg", "exp_avg_sq"):
                digest.update(f"{name} {key} {saved['num_steps']}".encode() + saved[key].numpy().tobytes())
        rows = read_metrics(self.directory / "metrics.jsonl")
        return digest.hexdigest(), [{"step": row["step"], "score": row["critic/score/mean"]} for row in rows]

    def disturb_ranks(self, count: int) -> Outcome:
        """Strikes ``count`` times, and finishes the last run."""
        outcome = Outcome()
        while True:
            self.launcher = random.choice(self.launchers)
            process = self.start()
            victim = self._strike(process, outcome) if outcome.counts["struck"] < count else None
            self._end(process, victim, outcome)
            if process.returncode == 0:
                outcome.counts["runs finished"] += 1
                if self.result() != self.expected:
                    outcome.failures.append(f"{self.directory}: other weights, moments or rows than undisturbed")
                if outcome.counts["struck"] >= count:
                    return outcome
                self.number += 1

    def _strike(self, process: subprocess.Popen[str], outcome: Outcome) -> tuple[str, int] | None:
        """Sends a signal at some moment; (what was struck, its process)."""
        factor = 1.0 if self.launcher == "one process" else 2.0
        with suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0.0, factor * self.seconds))
            return None
        family = descendants(process.pid)
        workers = [pid for pid in family if _is_worker(pid)]
        targets = ["driver", "everything", *(["rank"] * 3 if workers else [])]
        if workers and "\n 1/8 " in self.log.read_text():  # the deadline of the start is much longer
            targets += ["rank, stopped"] * 3
        target = random.choice(targets)
        if target == "everything":
            kill_all([process.pid, *family])
        victim = random.choice(workers) if target.startswith("rank") else process.pid
        if target == "rank, stopped":
            victim = max(workers)  # not rank 0 of torchrun, the driver
        with suppress(OSError):
            os.kill(victim, signal.SIGSTOP if target == "rank, stopped" else signal.SIGKILL)
        outcome.counts["struck"] += 1
        print(f"{outcome.counts['struck']}: {self.launcher}, {target}", flush=True)
        outcome.counts[f"{self.launcher}: {target}"] += 1
        return target, victim

    def _end(self, process: subprocess.Popen[str], victim: tuple[str, int] | None, outcome: Outcome) -> None:
        started = time.monotonic()
        try:
            process.wait(timeout=DEADLINE_S if victim else None)
        except subprocess.TimeoutExpired:
            outcome.failures.append(f"{self.launcher}: runs on {DEADLINE_S:g} s after {victim}: {self.log.read_text()}")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output = self.log.read_text()
        if victim is not None:
            outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - started)
        outcome.failures += [f"{self.launcher}, {victim}: left behind: {name}" for name in survivors()]
        ours = output.split("torch/distributed/elastic")[0]  # its agent reports in its own way, also in between
        named = NAMED.search(output)
        if victim is None and process.returncode != 0:
            outcome.failures.append(f"{self.launcher}: exit {process.returncode}: {output}")
            self.number += 1
        elif victim is not None and process.returncode in (1, 2) and named is None:
            outcome.counts["before or after the steps, or rank 0 itself"] += 1
            if "Traceback" in ours and self.launcher != "torchrun":
                outcome.failures.append(f"{self.launcher}, {victim}: exit {process.returncode}: {output}")
        elif named is not None:
            outcome.counts["named"] += 1
            if victim is not None and victim[0].startswith("rank") and int(named[1]) != victim[1]:
                outcome.failures.append(f"{self.launcher}, {victim}: another was named: {output}")


def _is_worker(pid: int) -> bool:
    """A rank that torchrun or Ray started."""
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"ray::RayWorker" in command or b"-u\0-m\0vexact\0train" in command
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--async-save", action="store_true", help="checkpoints are written beside the steps")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and what is struck")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as work:
        background = f"actor_rollout_ref.actor.checkpoint.async_save={str(arguments.async_save).lower()}"
        runs = RankRuns(Path(work), arguments.launchers, background)
        print(f"undisturbed: {STEPS} steps in {runs.seconds:.1f} s, SHA-256 {runs.expected[0]}", flush=True)
        runs.number += 1
        outcome = runs.disturb_ranks(arguments.faults)
    counts = ", ".join(f"{key}: {value}" for key, value in sorted(outcome.counts.items()))
    print(f"{counts}, slowest end {outcome.slowest_s:.1f} s; failures: {len(outcome.failures)}")
    print(*outcome.failures, sep="\n", end="\n" if outcome.failures else "")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
