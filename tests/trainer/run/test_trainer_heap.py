"""While steps run, the garbage collector of every process passes over what was there before them; then no more."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import heap_look
import pytest
import rank_runs
from heap_look import Look, is_walked
from processes import PATIENCE_S
from small_run import small_run

from vexact.config import load_config
from vexact.trainer.driver import Driver
from vexact.trainer.launch import run


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_in_this_process_leaves_the_collector_as_it_was(fails, overrides, monkeypatch):
    marker, seen, original = [], [], Driver._step

    def looking(driver, step):
        seen.append([is_walked(thing) for thing in (driver, driver.workers.engine, driver.workers.actor, marker)])
        assert gc.get_freeze_count() > 10_000
        if fails and step == 2:
            raise ArithmeticError("planted")
        return original(driver, step)

    monkeypatch.setattr(Driver, "_step", looking)
    settings = gc.isenabled(), gc.get_threshold()
    if fails:
        with pytest.raises(ArithmeticError, match="planted"):
            run(load_config(overrides()))
    else:
        assert run(load_config(overrides())) == 0
    assert seen == [[False] * 4] * (2 if fails else 3)
    assert is_walked(marker)
    assert (gc.isenabled(), gc.get_threshold()) == settings


def test_a_run_that_takes_no_step_leaves_what_others_froze(overrides, tiny):
    frozen = []
    gc.freeze()
    try:
        assert run(load_config(overrides(f"data.val_files={tiny / 'test.jsonl'}", "trainer.val_only=true"))) == 0
        assert not is_walked(frozen)
    finally:
        gc.unfreeze()


def said(folder):
    """What each process saw, by name, in the order of the steps."""
    found = {}
    for file in sorted(folder.iterdir()):
        found.setdefault(file.name.partition("_step_")[0], []).append(file.read_text())
    return found


RANK = ["walked", "passed over", "passed over"]  # the first sync comes before the self-test
DRIVER = ["passed over"] * 2


def arguments(tiny, directory):
    return [*small_run(tiny, directory), "trainer.total_training_steps=2", "trainer.logger=[jsonl]"]


def test_every_rank_of_torchrun_passes_over(tiny, tmp_path):
    (tmp_path / "seen").mkdir()
    look = Look("the update", "look", rank=0, folder=tmp_path / "seen")
    done = rank_runs.start(tmp_path / "logs", arguments(tiny, tmp_path / "run"), fault=look)
    assert done.wait() == [0, 0], done.output()
    assert said(tmp_path / "seen") == {"driver": DRIVER, "rank_0": RANK, "rank_1": RANK}


def test_the_driver_and_every_worker_of_ray_pass_over(tiny, tmp_path):
    (tmp_path / "seen").mkdir()
    script, more = Path(heap_look.__file__), [*arguments(tiny, tmp_path / "run"), "trainer.n_gpus_per_node=2"]
    done = subprocess.run(
        [sys.executable, script, tmp_path / "seen", *more],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{script.parents[2]}{os.pathsep}{script.parent}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert said(tmp_path / "seen") == {"driver": DRIVER, "rank_0": RANK, "rank_1": RANK}
    assert len({file.name.rpartition("_")[2] for file in (tmp_path / "seen").iterdir()}) == 3, "processes"


LEAVING = """
import gc, weakref
import torch.distributed as dist
from vexact.distributed.process_group import leave_process_group

class Held:
    pass

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
held = Held()
held.itself, gone = held, weakref.ref(held)
gc.freeze()
del held
gc.collect()
assert gone() is not None
leave_process_group()
assert gone() is None
"""


def test_what_waits_for_the_collector_goes_with_the_process_group_though_it_was_frozen():
    """In a process of its own: there is one default group in each, and the garbage of other tests."""
    subprocess.run([sys.executable, "-c", LEAVING], check=True, timeout=PATIENCE_S)
