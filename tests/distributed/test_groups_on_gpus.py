"""The same on two GPUs: NCCL, a GPU for every rank, and ranks that die or hang inside its collectives."""

from __future__ import annotations

import re
import uuid

import processes
import pytest


@pytest.mark.multi_gpu
@pytest.mark.parametrize("start", [processes.torchrun, processes.by_ray])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("none", r"cuda 2 \[4.0, 4.0\] pids"),
        ("kill", r"rank 1 \(host .*\) died in update"),
        ("stop", r"rank 1 \(host .*\) hangs in update"),
        ("value", "data.train_batch_size=3 is wrong"),
    ],
)
def test_a_group_on_two_gpus(start: processes.Start, kind: str, text: str) -> None:
    mark = uuid.uuid4().hex
    with processes.ending(mark):
        size = [] if start is processes.torchrun else ["--size=2"]
        run = start(mark, kind, "--device=cuda", *size)
        output, _ = run.communicate(timeout=processes.PATIENCE_S)
        assert (run.returncode == 0) == (kind == "none"), output
        assert re.search(text, output), output
        assert processes.until(lambda: processes.marked(mark) == [])
