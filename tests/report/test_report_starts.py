"""A run that went on under other settings: the report says which steps were made under which."""

import json

from test_report_html import page_of
from written_run import config, write_run

from vexact.report.html import read_run
from vexact.report.html.groups import grouped
from vexact.report.starts import FILE_NAME, Start, read_starts, write_starts


def changed_run(directory, *starts):
    """Starts as (first step, seed, total steps, save_freq); ``config.yaml`` is of the last one."""
    run = write_run(directory, seed=starts[-1][1], total_training_steps=starts[-1][2])
    names = ("seed", "total_training_steps", "save_freq")
    write_starts(run, [Start(step, config(**dict(zip(names, values, strict=True)))) for step, *values in starts])
    return run


def test_a_setting_that_changed_is_told_with_its_steps(tmp_path):
    run = changed_run(tmp_path / "run", (1, 3, 4, 1), (2, 3, 4, 2), (4, 5, 4, 2))
    assert read_run(run).changed == {"trainer.seed": "3 to step 3, 5 from step 4 on"}
    page = page_of(run)
    assert page.text.count("3 to step 3, 5 from step 4 on") == 2  # above, and among all keys
    assert "not the same in all steps: trainer.seed was 3 to step 3" in page.text


def test_the_number_of_steps_counts_where_the_learning_rate_ends_with_it(tmp_path):
    run = changed_run(tmp_path / "run", (1, 0, 3, 1), (4, 0, 4, 1))
    assert read_run(run).changed == {"trainer.total_training_steps": "3 to step 3, 4 from step 4 on"}
    settings = config(total_training_steps=4)
    settings["actor_rollout_ref"]["actor"]["optim"]["lr_scheduler_type"] = "constant"
    other = write_run(tmp_path / "other", settings=settings)
    earlier = json.loads(json.dumps(settings))
    earlier["trainer"]["total_training_steps"] = 3
    write_starts(other, [Start(1, earlier), Start(4, settings)])
    assert read_run(other).changed == {}


def test_a_changed_run_is_no_other_draw_of_the_last_settings(tmp_path):
    other = config()
    other["actor_rollout_ref"]["actor"]["optim"]["lr"] = 5e-4
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    write_starts(runs[1], [Start(1, other), Start(3, config())])
    groups = grouped([read_run(run) for run in runs])
    assert len(groups) == 2
    assert {group.label for group in groups} == {"lr=0.001", "lr=0.0005 to step 2, 0.001 from step 3 on"}


def test_lines_that_are_no_start_are_left_out(tmp_path):
    run = changed_run(tmp_path / "run", (1, 3, 4, 1))
    with (run / FILE_NAME).open("a") as file:
        file.write('null\n[]\n{"first_step": 0, "config": {}}\n{"first_step": true, "config": {}}\n\x00\n{"first_st')
    assert [start.first_step for start in read_starts(run)] == [1]
    assert read_run(run).changed == {}
