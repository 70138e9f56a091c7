"""The best checkpoint by a metric: kept, named by ``best``, and found again by a resumed run."""

import json
import shutil

import pytest

from vexact.config import load_config
from vexact.trainer.checkpoint import BestMetricError, BestPointer, CheckpointStore
from vexact.trainer.launch import run

METRIC = "critic/score/mean"


class Run:
    """A store whose checkpoints are empty directories; what it keeps is the matter here."""

    def __init__(self, directory, keep_last=1, metric=METRIC, mode="max"):
        self.directory = directory
        self.store = CheckpointStore(directory, keep_last, BestPointer(directory, metric, mode))

    def step(self, step, value, before=False, **metrics):
        """``before``: the metric is known while the checkpoint is on its way."""
        metrics |= {} if value is None else {METRIC: value}
        self.store._coming = step
        if before:
            self.store.note_metrics(step, metrics, validated=True)
        self.store.path(step).mkdir(parents=True)
        self.store._coming = None
        self.store._remove_old(step)  # as publishing ends
        if not before:
            self.store.note_metrics(step, metrics, validated=True)
        return self.store.steps()

    @property
    def best(self):
        file = self.directory / "best"
        return file.read_text() if file.exists() else None


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("mode", "values", "kept", "best"),
    [
        ("max", [0.1, 0.5, 0.3, 0.4], [2, 4], 2),
        ("min", [0.1, 0.5, 0.3, 0.4], [1, 4], 1),
        ("max", [0.5, 0.5, 0.5], [1, 3], 1),
        ("max", [0.1, 0.2, 0.3], [3], 3),
        ("max", [0.3, float("nan"), 0.1], [1, 3], 1),
        ("min", [float("inf"), float("nan")], [2], None),
    ],
)
def test_the_best_is_kept_beyond_keep_last(tmp_path, mode, values, kept, best, before):
    run = Run(tmp_path, mode=mode)
    for step, value in enumerate(values, 1):
        run.step(step, value, before)
    assert run.store.steps() == kept
    assert run.best == (None if best is None else f"checkpoints/step_{best}\n")


def test_a_resumed_run_goes_on_ranking(tmp_path):
    run = Run(tmp_path)
    for step, value in ((1, 0.9), (2, 0.1), (3, 0.2)):
        run.step(step, value)
    again = Run(tmp_path)
    assert again.step(4, 0.5) == [1, 4]
    assert again.step(5, 0.95) == [5]
    assert again.best == "checkpoints/step_5\n"
    assert again.step(6, 0.0) == [5, 6]


def test_a_run_that_is_set_back_ranks_what_it_has_left(tmp_path):
    run = Run(tmp_path, keep_last=None)
    for step, value in ((1, 0.2), (2, 0.3), (3, 0.9), (4, 0.8)):
        run.step(step, value)
    assert run.best == "checkpoints/step_3\n"
    again = Run(tmp_path, keep_last=None)
    again.store.set_aside([3, 4], 1)
    assert again.best == "checkpoints/step_2\n"
    again.store.path(3).mkdir()
    assert Run(tmp_path, keep_last=None).store.best.refresh([1, 2, 3]) == 2, "what lay there before is forgotten"
    again.store.set_aside([1, 2, 3], 2)
    assert again.best is None
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize("damage", ["another metric", "another mode", "text", "no values", "gone", "checkpoint gone"])
def test_values_of_something_else_do_not_count(tmp_path, damage, caplog):
    caplog.set_level("INFO", logger="vexact")
    run = Run(tmp_path, keep_last=None)
    run.step(1, 0.9)
    run.step(2, 0.2)
    file = tmp_path / "best.json"
    content = json.loads(file.read_text())
    if damage == "checkpoint gone":
        shutil.rmtree(tmp_path / "checkpoints" / "step_1")
    elif damage == "gone":
        file.unlink()
    else:
        other = {"another metric": content | {"metric": "x"}, "another mode": content | {"mode": "min"}}
        other["no values"] = {key: content[key] for key in ("metric", "mode")}
        file.write_text(json.dumps(other[damage]) if damage in other else "no json")
    again = Run(tmp_path, keep_last=None)
    again.step(3, 0.1)
    assert again.best == ("checkpoints/step_2\n" if damage == "checkpoint gone" else "checkpoints/step_3\n")
    assert ("ranking starts anew" in caplog.text) == damage.startswith("another")


def test_without_a_metric_nothing_is_written(tmp_path):
    run = Run(tmp_path, metric=None)
    assert [run.step(step, 0.5) for step in (1, 2)] == [[1], [2]]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("metric", "validated", "near"),
    [
        ("critic/score/men", False, "critic/score/mean"),
        ("reward", False, "critic/rewards/mean"),
        ("val-core/sum/reward/mean@2", True, "val-core/sum/reward/mean@1"),
        ("actr", False, "actor/lr"),
    ],
)
def test_a_metric_that_no_step_reports_is_named_with_near_ones(tmp_path, metric, validated, near):
    metrics = {"critic/score/mean": 1.0, "critic/rewards/mean": 0.5, "actor/lr": 0.1}
    metrics |= {"val-core/sum/reward/mean@1": 0.5} if validated else {}
    with pytest.raises(BestMetricError, match=rf"trainer\.best_metric={metric}: .* near names: .*{near}"):
        BestPointer(tmp_path, metric).value(metrics, validated)


def test_a_step_without_validation_has_no_value(tmp_path):
    assert BestPointer(tmp_path, "val-core/sum/reward/mean@1").value({"actor/lr": 0.1}, validated=False) is None


def test_a_run_keeps_its_best_and_an_unknown_metric_costs_nothing(overrides, tiny, tmp_path, metrics):
    more = (
        "trainer.save_freq=1",
        "trainer.keep_last=1",
        "trainer.test_freq=1",
        f"data.val_files={tiny / 'test.jsonl'}",
    )
    with pytest.raises(ValueError, match=r"trainer\.best_metric=critic/score/mene: .*near names: critic/score/mean"):
        run(load_config(overrides(*more, "trainer.best_metric=critic/score/mene")))
    assert (tmp_path / "run" / "latest").read_text() == "checkpoints/step_1\n"
    assert run(load_config(overrides(*more, "trainer.best_metric=val-core/sum/reward/mean@1"))) == 0
    best = max((row["val-core/sum/reward/mean@1"], -row["step"]) for row in metrics() if row["step"] in (2, 3))
    assert (tmp_path / "run" / "best").read_text() == f"checkpoints/step_{-best[1]}\n"
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {f"step_{-best[1]}", "step_3"}


def test_a_metric_of_a_validation_needs_one(overrides):
    with pytest.raises(ValueError, match=r"trainer\.best_metric=val-core/x needs a validation; set data\.val_files"):
        load_config(overrides("trainer.best_metric=val-core/x"))
