"""`vexact train` on a Ray cluster, and as a job of it: who is lost is named, and a job says last why it failed."""

from pathlib import Path

import processes
import pytest
import rank_runs
from fault_arguments import BACKGROUND, STEPS, arguments, assert_readable, assert_whole, goes_on_after, last_saved
from planted_fault import Fault
from ray_head import RAY, Head, ray_head
from run_results import digest, rows

from vexact.config import load_config
from vexact.trainer.launch import run

TWO = ("trainer.n_gpus_per_node=2",)


@pytest.fixture(scope="module")
def head():
    with ray_head() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """SHA-256 of weights and moments of a run on one process."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(load_config(arguments(tiny, directory, "trainer.logger=[jsonl]"))) == 0
    return digest(directory, STEPS)


@pytest.mark.parametrize(
    ("fault", "how", "more", "saved"),
    [
        (
            Fault("the update", "SIGKILL", version=2, call=1),
            "died in the update: its process is gone .*",
            (BACKGROUND,),
            (1, 2),
        ),
        (
            Fault("the weight sync", "SIGSTOP", call=1),
            "hangs in the weight sync: the process does not answer and has not finished in 600 s .*",
            ("trainer.worker_timeout_s=600",),
            (1,),
        ),
    ],
)
def test_an_actor_that_is_lost_is_named_and_the_run_goes_on(fault, how, more, saved, head, tiny, undisturbed, tmp_path):
    directory = tmp_path / "run"
    command = arguments(tiny, directory, *more)
    lost = rank_runs.start(tmp_path / "lost", [*command, *TWO, f"trainer.ray_address={head.address}"], 1, fault)
    assert lost.wait() == [1], lost.output()
    last = last_saved(lost.output(), directory)
    assert last in saved
    assert_readable(
        lost.output(), rf"vexact train: rank 1 \(host .*, pid \d+\) {how}; {goes_on_after(last, directory)}"
    )
    assert processes.until(lambda: head.workers() == [])
    assert lost.left() == []
    assert_whole(directory, *range(1, last + 1))
    resumed = rank_runs.start(tmp_path / "resumed", command, 1)
    assert resumed.wait() == [0], resumed.output()
    assert digest(directory, STEPS) == undisturbed
    assert [row["step"] for row in rows(directory)] == list(range(1, STEPS + 1))


def submit(head: Head, *arguments: str) -> tuple[int, str]:
    """The exit code and the console of examples/multinode/ray_job.sh."""
    job = processes.start(
        ["bash", str(processes.ROOT / "examples" / "multinode" / "ray_job.sh"), *arguments],
        head.mark,
        RAY_API=head.dashboard,
        PATH=f"{Path(RAY).parent}:/usr/bin:/bin",
    )
    output, _ = job.communicate(timeout=processes.PATIENCE_S)
    return job.returncode, output


def test_a_job_trains_with_the_bits_of_one_process(head, tiny, undisturbed, tmp_path):
    code, output = submit(head, *arguments(tiny, tmp_path / "run", *TWO))
    assert code == 0, output
    assert "done: steps 1 to 3" in "\n".join(output.splitlines()[-12:])
    assert "Traceback" not in output
    assert digest(tmp_path / "run", STEPS) == undisturbed
    assert processes.until(lambda: head.workers() == [])


def test_a_job_that_fails_says_why_in_its_last_lines(head, tiny, tmp_path):
    (tmp_path / "bad.py").write_text("def compute_score(*args, **kwargs):\n    return float('nan')\n")
    reward = f"reward.custom_reward_function.path={tmp_path / 'bad.py'}"
    code, output = submit(head, *arguments(tiny, tmp_path / "run", *TWO, reward))
    assert code != 0, output
    assert "nan" in "\n".join(output.splitlines()[-12:]), output
    assert processes.until(lambda: head.workers() == [])
