"""perf/num_alloc_retries: of each step alone, and a remark once that says what to lower."""

import logging
from types import SimpleNamespace

import pytest

from vexact.config import load_config
from vexact.trainer.launch import run
from vexact.trainer.step.memory_health import MemoryHealth
from vexact.trainer.workers import memory_use
from vexact.trainer.workers.memory_use import MemoryUse

NAME, REMARK = "perf/num_alloc_retries", "a GPU's memory is nearly full"


@pytest.fixture
def allocator(monkeypatch):
    """Counts as PyTorch's does, from the process's start; ``totals`` holds what it says, the last one for good."""
    totals = [0]

    def memory_stats():
        return {"num_alloc_retries": totals.pop(0) if len(totals) > 1 else totals[0]}

    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        max_memory_allocated=lambda: 2**30,
        max_memory_reserved=lambda: 2**31,
        memory_stats=memory_stats,
    )
    monkeypatch.setattr(memory_use, "torch", SimpleNamespace(cuda=cuda))
    return SimpleNamespace(cuda=cuda, totals=totals)


def told(caplog):
    return [record.getMessage() for record in caplog.records if REMARK in record.getMessage()]


def test_each_step_counts_its_own(allocator):
    allocator.totals[:] = [7, 7, 10, 10, 11]  # 7 of a trainer that this process had before
    use = MemoryUse()
    assert [use.metrics()[NAME] for _ in range(5)] == [0, 3, 0, 1, 0]
    assert use.metrics()["perf/max_memory_reserved_gb"] == 2


def test_without_a_gpu_there_is_no_count_and_one_that_comes_later_counts(allocator):
    allocator.cuda.is_initialized = lambda: False
    use = MemoryUse()
    assert NAME not in use.metrics()
    allocator.cuda.is_initialized = lambda: True
    allocator.totals[:] = [2]
    assert use.metrics()[NAME] == 2


def test_the_remark_comes_once_and_not_for_the_first_step_of_a_process(overrides, caplog):
    caplog.set_level(logging.WARNING)
    health = MemoryHealth(load_config(overrides()), first=4)
    for step, metrics in enumerate(({NAME: 5.0}, {}, {NAME: 0.0}), start=4):
        health.check(step, metrics)
    assert told(caplog) == []
    for step in (7, 8):
        health.check(step, {NAME: 3.0})
    (text,) = told(caplog)
    assert "tried again 3 time(s) in step 7" in text
    lower = [part for part in text.split("; ") if "a lower actor_rollout_ref." in part]
    assert [part.split(" (now ")[0].rpartition("a lower actor_rollout_ref.")[2] for part in lower] == [
        "actor.ppo_max_token_len_per_gpu",
        "rollout.gpu_memory_utilization",
    ]
    assert "actor_rollout_ref.actor.fsdp_config.optimizer_offload=true" in text


@pytest.mark.parametrize(("later", "remarks"), [((4, 4, 4), 0), ((4, 6, 7), 1)])
def test_a_run_reports_them_and_says_so(later, remarks, overrides, metrics, allocator, caplog):
    caplog.set_level(logging.WARNING)
    allocator.totals[:] = [
        1,
        2,
        *later,
    ]  # as the workers are made, at the sync before the first step, and at each step's
    assert run(load_config(overrides("trainer.val_before_train=false"))) == 0
    counted = [row[NAME] for row in metrics()]
    assert counted == [later[0] - 2, later[1] - later[0], later[2] - later[1]]
    assert len(told(caplog)) == remarks
