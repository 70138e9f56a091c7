"""A look at a trained run: what it says, and that it leaves the run's own values."""

import logging

from vexact.config import load_config
from vexact.report.sinks.jsonl import read_metrics
from vexact.trainer.launch import run

VALUE = "val-core/sum/reward/mean@1"


def test_a_validation_under_other_settings_leaves_the_runs_own_values(overrides, tiny, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger="vexact")
    directory = tmp_path / "run"
    own = (f"data.val_files={tiny / 'test.jsonl'}", "trainer.total_training_steps=1", "trainer.logger=[console,jsonl]")

    def start(*more):
        caplog.clear()
        assert run(load_config(overrides(*own, *more))) == 0
        return caplog.text

    start()
    metrics, samples = directory / "metrics.jsonl", directory / "samples" / "val_1.jsonl"
    before, value = samples.read_text(), read_metrics(metrics)[-1][VALUE]
    capsys.readouterr()
    assert "validating step 1" in start("trainer.val_only=true", "actor_rollout_ref.rollout.page_size=8")
    assert (samples.read_text(), read_metrics(metrics)[-1][VALUE]) == (before, value)
    told = capsys.readouterr().out
    for part in ("step 1: testing ...", "nothing is compared", "trainer.val_only=true validates and stops"):
        assert part in told
    assert "optimizer step" not in told
    assert "only the last step is saved" not in told

    content = metrics.read_bytes()
    for name in ("step_1", "step_1.1"):
        place = directory / "validations" / name
        text = start("trainer.val_only=true", "data.val_max_samples=2")
        assert f"is kept in {place}: data.val_max_samples=2 (was -1)" in text
        assert len((place / "samples" / "val_1.jsonl").read_text().splitlines()) == 2
        assert [row["step"] for row in read_metrics(place / "metrics.jsonl")] == [1]
        assert (place / "config.yaml").exists()
    assert (samples.read_text(), metrics.read_bytes()) == (before, content)

    assert "resuming after step 1" in start("trainer.total_training_steps=2")
    start("trainer.resume_mode=disable")
    assert sorted(path.name for path in (directory / "validations.1").iterdir()) == ["step_1", "step_1.1"]
    assert not (directory / "validations").exists()
