"""A step that is saved and reported although the run was killed before it could say so."""

import pytest

from vexact.config import load_config
from vexact.trainer.launch import run
from vexact.trainer.run.pending_step import PendingStep


def test_a_run_killed_between_a_report_and_its_mark_has_the_row_once(overrides, metrics, tiny, monkeypatch):
    more = (f"data.val_files={tiny / 'test.jsonl'}", "trainer.test_freq=1", "trainer.save_freq=1")
    clear, calls = PendingStep.clear, []

    def killed(self):
        calls.append(self)
        if len(calls) == 3:  # the start, step 1, step 2
            raise KeyboardInterrupt
        clear(self)

    config = load_config(overrides(*more, "trainer.total_training_steps=2"))
    monkeypatch.setattr(PendingStep, "clear", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(PendingStep, "clear", clear)
    before = metrics()
    run(config)
    assert [row["step"] for row in before] == [row["step"] for row in metrics()] == [0, 1, 2]
    reward = "val-core/sum/reward/mean@1"
    assert [row[reward] for row in before] == [row[reward] for row in metrics()]
