"""Flips random bits in the files of a checkpoint, one at a time, and counts the flips that a resume does not notice.

    python -m benchmarks.faults.bit_flips                        # trains the tiny model for 2 steps, then 200 flips
    python -m benchmarks.faults.bit_flips --checkpoint RUN/checkpoints/step_N --flips 1000 --resumes 0

Every file is as likely as any other, and every bit of it as any other. A flip is *named* when reading the checkpoint
is refused and the message has the file's name, *unnoticed* when it is read. ``--resumes`` more flips go through the
command ``vexact train``, which must end with exit code 2. Exit code 1 when any flip is unnoticed or not named.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vexact.trainer.checkpoint import CheckpointError, load_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200, help="bits to flip, each read back in this process")
    parser.add_argument("--resumes", type=int, default=5, help="further bits to flip, each with a run that resumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of its own run; copied, never changed")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if arguments.checkpoint is None:
            step = train_tiny(work)
        else:
            step = shutil.copytree(arguments.checkpoint, work / "run" / "checkpoints" / arguments.checkpoint.name)
        load_checkpoint(step)  # whole before the first flip
        by_file, read_back = flip(step, draw, arguments.flips)
        resumed = resume(work, step, draw, arguments.resumes if arguments.checkpoint is None else 0)
        load_checkpoint(step)  # and after the last
    for name, count in sorted(by_file.items()):
        print(f"  {count:4d} in {name}")
    print(report("read back", read_back))
    if resumed.total():
        print(report("vexact train", resumed))
    together = read_back + resumed
    return int(together["unnoticed"] > 0 or together["not named"] > 0)


def report(what: str, counts: Counter[str]) -> str:
    numbers = ", ".join(f"{counts[kind]} {kind}" for kind in ("named", "not named", "unnoticed"))
    return f"{what}: {counts.total()} flips, {numbers}"


def flip(step: Path, draw: random.Random, count: int) -> tuple[Counter[str], Counter[str]]:
    """How often each file was hit, and what came of the flips."""
    by_file: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        with one_bit(step, draw) as file:
            by_file[str(file.relative_to(step))] += 1
            try:
                load_checkpoint(step)
                outcomes["unnoticed"] += 1
            except CheckpointError as error:
                outcomes["named" if file.name in str(error) else "not named"] += 1
    return by_file, outcomes


def resume(work: Path, step: Path, draw: random.Random, count: int) -> Counter[str]:
    """The same by whole runs that would train one step more."""
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        with one_bit(step, draw) as file:
            ended = subprocess.run(command(work, steps=3), capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            outcomes["unnoticed"] += 1
        else:
            named = ended.returncode == 2 and str(file) in ended.stderr
            outcomes["named" if named else "not named"] += 1
    return outcomes


@contextmanager
def one_bit(step: Path, draw: random.Random) -> Iterator[Path]:
    """Yields the file in which one bit is other than it was while the block runs."""
    file = draw.choice(sorted(path for path in step.rglob("*") if path.is_file()))
    position, bit = draw.randrange(file.stat().st_size), 1 << draw.randrange(8)
    toggle(file, position, bit)
    try:
        yield file
    finally:
        toggle(file, position, bit)


def toggle(file: Path, position: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ bit]))


def train_tiny(work: Path) -> Path:
    """The checkpoint of a run of two steps."""
    subprocess.run([sys.executable, "-m", "vexact", "prepare", "tiny", "--out", str(work / "tiny")], check=True)
    subprocess.run(command(work, steps=2), check=True)
    return work / "run" / "checkpoints" / "step_2"


def command(work: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vexact", "train", "trainer.logger=[jsonl]"),
        f"actor_rollout_ref.model.path={work / 'tiny' / 'model'}",
        f"data.train_files={work / 'tiny' / 'train.parquet'}",
        *("data.max_prompt_length=32", "data.max_response_length=8", "data.train_batch_size=4"),
        "actor_rollout_ref.rollout.n=4",
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={work / 'run'}",
    ]


if __name__ == "__main__":
    sys.exit(main())
