"""Kills and signals at random moments of a run: what is lost, what stays behind, and is the result the same?

    python -m benchmarks.faults.kills --kills 25 --signals 60
    python -m benchmarks.faults.kills --kills 25 --signals 60 --async-save   # checkpoints on their way

A tiny model trains for a few steps, once undisturbed. Then the same run is ended by SIGKILL and started again, until it
is done: its weights must have the same SHA-256 and its metrics the same rows. Then the same with SIGTERM and SIGINT in
turn, every third time a second signal after the first, from the imports to the exit: the exit code must be 130, within
DEADLINE_S, without a traceback. After every end no process may be left. Prints the counts; exit 1 on a failure.

A signal before Python has reached the first line of the program meets Python's own handlers (or none), and one after
the work is done ends a process whose code is 0: both are counted apart. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vexact.models import ModelConfig, random_model, save_hf
from vexact.prepare.tokenizers import character_tokenizer
from vexact.report.sinks.jsonl import read_metrics

STEPS = 8
DEADLINE_S = 15.0  # for a signal to end the process, on a busy machine
ORPHANS_S = 5.0  # for the processes that a dead driver started
CLOCKS = ("time", "timing_s", "perf", "reward/time_s", "rollout/decode", "rollout/host")
PR_SET_CHILD_SUBREAPER = 36
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(c in "13579" for c in solution_str) / max(1, len(solution_str))
"""
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
}


@dataclass
class Outcome:
    """What happened to the disturbed runs."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0  # from a signal to the end of the process


class Runs:
    """Run directories of one configuration under ``work``, and what an undisturbed one comes to."""

    def __init__(self, work: Path, *more: str) -> None:
        self.work, self.number = work, 0
        self.options = [*_inputs(work), *more]
        started = time.monotonic()
        process = self.start()
        output = process.communicate()[0]
        assert process.returncode == 0, output
        self.seconds = time.monotonic() - started
        self.expected = self.result()

    @property
    def directory(self) -> Path:
        return self.work / f"run_{self.number}"

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vexact", "train", *self.options]
        command.append(f"trainer.default_local_dir={self.directory}")
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def result(self) -> tuple[str, list[dict[str, object]]]:
        """SHA-256 of the trained weights, and the metrics without clocks."""
        weights = self.directory / "checkpoints" / f"step_{STEPS}" / "model.safetensors"
        rows = read_metrics(self.directory / "metrics.jsonl")
        kept = [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]
        return hashlib.sha256(weights.read_bytes()).hexdigest(), kept

    def disturb(self, count: int, end: Callable[[subprocess.Popen[str], Outcome], None]) -> Outcome:
        """Starts runs until ``end`` has ended ``count`` processes, and finishes the last run."""
        outcome = Outcome()
        while True:
            process = self.start()
            if outcome.counts["sent"] < count:
                end(process, outcome)
            output = process.communicate()[0]
            outcome.failures += [f"left behind: {name}" for name in survivors()]
            if process.returncode == 0:
                outcome.counts["runs finished"] += 1
                if self.result() != self.expected:
                    outcome.failures.append(f"{self.directory}: other weights or metrics than the undisturbed run")
                if outcome.counts["sent"] >= count:
                    return outcome
                self.number += 1
            elif process.returncode in (1, 2):
                outcome.failures.append(f"exit {process.returncode}: {output}")
                self.number += 1

    def kill(self, process: subprocess.Popen[str], outcome: Outcome) -> None:
        """SIGKILL to the driver alone: what it started has to notice by itself."""
        if self._wait(process):
            process.kill()
            outcome.counts["sent"] += 1

    def interrupt(self, process: subprocess.Popen[str], outcome: Outcome) -> None:
        """SIGTERM or SIGINT, sometimes twice."""
        if not self._wait(process):
            return
        number = outcome.counts["sent"]
        first, second = (signal.SIGTERM, signal.SIGINT) if number % 2 else (signal.SIGINT, signal.SIGTERM)
        is_handled = _handles_signals(process.pid)
        started = time.monotonic()
        process.send_signal(first)
        outcome.counts["sent"] += 1
        if number % 3 == 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.0, 1.5))
            if process.poll() is None:
                process.send_signal(second)
                outcome.counts["sent twice"] += 1
        self._judge(process, outcome, is_handled, started)

    def _wait(self, process: subprocess.Popen[str]) -> bool:
        """A random while, at most as long as a whole run takes; whether the process still runs then."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0.0, 1.1 * self.seconds))
        return process.poll() is None

    def _judge(self, process: subprocess.Popen[str], outcome: Outcome, is_handled: bool, started: float) -> None:
        try:
            output = process.communicate(timeout=DEADLINE_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            outcome.failures.append(f"still running {DEADLINE_S:g} s after the signal")
            return
        outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - started)
        code = process.returncode
        if not is_handled:
            outcome.counts["before the program's first line"] += 1
        elif code == 0 and (self.directory / "checkpoints" / f"step_{STEPS}").is_dir():
            outcome.counts["exit 0, the work was done"] += 1
        elif code == 130 and "Traceback" not in output:
            outcome.counts["exit 130"] += 1
        else:
            outcome.failures.append(f"exit {code} after a signal: {output}")


def _inputs(work: Path) -> list[str]:
    """Writes model, prompts and reward; returns the configuration of a run."""
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(work / "model")
    raw = SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = ModelConfig.from_hf_dict(raw)
    save_hf(random_model(config, seed=0).named_parameters(), config, work / "model")
    rows = [
        {"data_source": "sum", "prompt": f"{i}+{j}=", "reward_model": {"ground_truth": str(i + j)}}
        for i in range(8)
        for j in range(8)
    ]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "reward.py").write_text(REWARD)
    return [
        f"actor_rollout_ref.model.path={work / 'model'}",
        f"data.train_files={work / 'train.jsonl'}",
        f"reward.custom_reward_function.path={work / 'reward.py'}",
        "data.max_prompt_length=16",
        "data.max_response_length=24",
        "data.train_batch_size=8",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "reward.num_workers=1",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=2",
        "trainer.logger=[console,jsonl]",
        "trainer.device=cpu",
    ]


def _handles_signals(pid: int) -> bool:
    """Whether the process catches SIGTERM, or ignores it at its very end."""
    with suppress(OSError):  # it may end while it is read
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("SigCgt", "SigIgn")) and int(line.split()[1], 16) & (1 << (signal.SIGTERM - 1)):
                return True
    return False


def adopt_orphans() -> None:
    """Makes this process the parent of whatever a dead descendant leaves behind."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def survivors() -> list[str]:
    """Command lines of processes that are still there ORPHANS_S after their driver's end; they are killed."""
    deadline = time.monotonic() + ORPHANS_S
    while (left := list(_children())) and time.monotonic() < deadline:
        time.sleep(0.02)
    names = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200] for pid in left]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return names


def _children() -> Iterator[int]:
    """Children of this process that live; those that have ended are reaped."""
    for task in Path("/proc/self/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            with suppress(ChildProcessError):  # the list may name one twice while processes end
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    yield pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--signals", type=int, default=60)
    parser.add_argument("--async-save", action="store_true", help="checkpoints are written beside the steps")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child must not inherit that it is ignored
    failed = False
    with tempfile.TemporaryDirectory() as work:
        background = f"actor_rollout_ref.actor.checkpoint.async_save={str(arguments.async_save).lower()}"
        runs = Runs(Path(work), background)
        print(f"undisturbed: {STEPS} steps in {runs.seconds:.1f} s, SHA-256 {runs.expected[0]}")
        for name, count, end in (
            ("SIGKILL", arguments.kills, runs.kill),
            ("SIGTERM and SIGINT", arguments.signals, runs.interrupt),
        ):
            runs.number += 1
            outcome = runs.disturb(count, end)
            counts = ", ".join(f"{key}: {value}" for key, value in outcome.counts.items())
            slowest = f", slowest end {outcome.slowest_s:.1f} s" if outcome.slowest_s else ""
            print(f"{name}: {counts}{slowest}; failures: {len(outcome.failures)}")
            print(*outcome.failures, sep="\n", end="\n" if outcome.failures else "")
            failed = failed or bool(outcome.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
