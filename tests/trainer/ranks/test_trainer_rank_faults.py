"""Ranks that die, hang, run out of memory or sample other bits, in every stage of `vexact train` on two of them: who it
was is said, nothing stays behind, and the run that goes on ends with the bits of one that nothing happened to."""

import re
import signal
import socket
from functools import partial
from pathlib import Path

import fault_arguments
import pytest
import rank_runs
from fault_arguments import BACKGROUND, STEPS, assert_readable, assert_whole, goes_on_after, last_saved
from planted_fault import Fault
from run_results import digest, rows

from vexact.config import load_config
from vexact.trainer.launch import run

# where a rank can be while it saves beside its steps
MEANWHILE = "(a checkpoint|generation|the update|the weight sync|an idle moment after .+)"


@pytest.fixture(scope="module")
def arguments(tiny):
    return partial(fault_arguments.arguments, tiny)


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    """SHA-256 of weights and moments of a run on one process."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(load_config(arguments(directory, "trainer.logger=[jsonl]"))) == 0
    return digest(directory, STEPS)


def goes_on(command: list[str], directory: Path, ranks: int, undisturbed: str) -> None:
    """The same command ends with the bits of the undisturbed run, and with one row per step."""
    resumed = rank_runs.start(directory.parent / "resumed", command, ranks)
    assert set(resumed.wait()) == {0}, resumed.output()
    assert digest(directory, STEPS) == undisturbed
    assert [row["step"] for row in rows(directory)] == list(range(1, STEPS + 1))
    assert resumed.left() == []


@pytest.mark.parametrize(
    ("fault", "more", "stage", "saved", "ranks"),
    [
        (Fault("generation", "SIGKILL"), (), "generation", (1,), 2),
        (Fault("the update", "SIGKILL", version=2, call=1), (BACKGROUND,), "the update", (1, 2), 1),
        (Fault("the update", "SIGKILL", version=2, call=1, is_hidden=True), (), "the update", (2,), 1),
        (Fault("the weight sync", "SIGSTOP", call=1), (), "the weight sync", (1,), 1),
        (Fault("a checkpoint", "SIGKILL", version=2, call=20), (), "a checkpoint", (1,), 1),
        (Fault("a checkpoint", "SIGKILL", version=2, call=20), (BACKGROUND,), MEANWHILE, (0, 1), 2),
    ],
    ids=lambda value: value.stage + " " + value.kind if isinstance(value, Fault) else None,
)
def test_a_rank_that_is_lost_is_named_and_the_run_goes_on(
    fault, more, stage, saved, ranks, arguments, undisturbed, tmp_path
):
    """``saved``: one of these steps is the last. What is written beside a step may be done before it or after it."""
    directory = tmp_path / "run"
    command = arguments(directory, *more)
    lost = rank_runs.start(tmp_path / "lost", command, fault=fault)
    assert lost.wait() == [1, -signal.SIGKILL], lost.output()
    who = rf"rank 1 \(host {re.escape(socket.gethostname())}, pid {lost.processes[1].pid}\)"
    how = "hangs" if fault.kind == "SIGSTOP" else "died"
    last = last_saved(lost.output(), directory)
    assert last in saved
    assert_readable(lost.output(), rf"vexact train: {who} {how} in {stage}: .*; {goes_on_after(last, directory)}")
    assert_readable(lost.output(1))
    assert lost.left() == []
    assert_whole(directory, *range(1, last + 1))
    goes_on(command, directory, ranks, undisturbed)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_that_is_killed_goes_on_with_other_ranks(before, after, arguments, undisturbed, tmp_path):
    """Killed with a checkpoint on its way."""
    command = arguments(tmp_path / "run", BACKGROUND)
    fault = Fault("a checkpoint", "SIGKILL", version=2, call=30, rank=0)
    killed = rank_runs.start(tmp_path / "killed", command, before, fault)
    assert killed.wait() == [-signal.SIGKILL, 1][:before]
    assert killed.left() == []
    goes_on(command, tmp_path / "run", after, undisturbed)
    assert_whole(tmp_path / "run", STEPS - 1, STEPS)


@pytest.mark.parametrize(
    ("stage", "kind", "version", "call", "more", "saved"),
    [
        ("generation", "SIGINT", 1, 3, (), (1,)),
        ("the update", "SIGTERM", 1, 1, (), (1,)),
        ("the weight sync", "SIGINT", 1, 1, (), (1,)),
        ("a checkpoint", "SIGTERM", 2, 20, (), (1,)),
        ("a checkpoint", "SIGINT", 2, 20, (BACKGROUND,), (0, 1)),
    ],
)
def test_an_interrupt_ends_all_ranks(stage, kind, version, call, more, saved, arguments, tmp_path):
    directory = tmp_path / "run"
    fault = Fault(stage, kind, version, call, rank=0)
    interrupted = rank_runs.start(tmp_path / "interrupted", arguments(directory, *more), fault=fault)
    codes = interrupted.wait()
    assert codes[0] == 130, (codes, interrupted.output())
    last = last_saved(interrupted.output(), directory)
    assert last in saved
    assert_readable(interrupted.output(), "interrupted; " + goes_on_after(last, directory))
    assert_readable(interrupted.output(1))
    assert interrupted.left() == []
    assert_whole(directory, *range(1, last + 1))


def test_other_bits_on_one_rank_stop_all_before_the_step(arguments, undisturbed, tmp_path):
    directory = tmp_path / "run"
    command = arguments(directory)
    stopped = rank_runs.start(tmp_path / "stopped", command, fault=Fault("generation", "weight"))
    assert rank_runs.was_refused(stopped.wait()), stopped.output()
    output = stopped.output()
    assert "rollout and trainer disagree" in output
    assert "First: request step2-" in output
    assert "first divergence: weights: tensor embed_tokens.weight not synced" in output
    assert "The weights are as they were before this step" in output
    assert re.search(rf"\nsampled by rank 1 \(host .*, pid {stopped.processes[1].pid}\)\n", output), output
    assert re.search(r"\ncompared by rank (0|1|0, 1) of 2\n", output), output
    assert "Traceback" not in output + stopped.output(1)
    assert stopped.left() == []
    assert_whole(directory, 1)
    assert rows(directory)[-1]["bitwise/tokens_different"] > 0
    goes_on(command, directory, 1, undisturbed)


def test_a_rank_without_memory_says_what_makes_room(arguments, tmp_path):
    full = rank_runs.start(tmp_path / "full", arguments(tmp_path / "run"), fault=Fault("the update", "memory", call=1))
    assert rank_runs.was_refused(full.wait()), full.output()
    what = (
        rf"vexact train: rank 1 \(host .*, pid {full.processes[1].pid}\) ran out of memory in the update: CUDA out of "
        r"memory\. Tried to allocate 20\.00 GiB\. .* To need less memory: .*; a lower "
        r"actor_rollout_ref\.actor\.ppo_max_token_len_per_gpu \(now 40, at least 28\); .*"
    )
    assert_readable(full.output(), what, ".*--debug.*")
    assert full.left() == []


def test_one_process_without_memory_says_it_too(arguments, tmp_path):
    fault = Fault("generation", "memory", rank=0)
    full = rank_runs.start(tmp_path / "full", arguments(tmp_path / "run"), 1, fault)
    assert full.wait() == [2], full.output()
    what = r"vexact train: out of memory in generation: CUDA out .* memory: a lower .*gpu_memory_utilization \(now .*"
    assert_readable(full.output(), what, ".*--debug.*")


def test_a_grader_that_never_works_ends_all_ranks(arguments, tmp_path):
    (tmp_path / "bad.py").write_text("def compute_score(*args, **kwargs):\n    raise OSError('no grader today')\n")
    more = f"reward.custom_reward_function.path={tmp_path / 'bad.py'}"
    stopped = rank_runs.start(tmp_path / "stopped", arguments(tmp_path / "run", more))
    assert rank_runs.was_refused(stopped.wait()), stopped.output()
    assert "no grader today" in "\n".join(stopped.output().splitlines()[-12:])
    assert stopped.left() == []
