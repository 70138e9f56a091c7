"""A run ends with its report, whatever became of the run, and whatever becomes of the report."""

import errno
import json
import re

import pytest

from vexact.audit import ExactnessError
from vexact.config import load_config
from vexact.report import Reporter, write_samples
from vexact.report.html import page as page_module
from vexact.trainer import driver as driver_module
from vexact.trainer.launch import run
from vexact.trainer.run import final_report
from vexact.trainer.step import samples

REPORT = "trainer.report=true"


@pytest.fixture
def lines(caplog):
    caplog.set_level("INFO", logger="vexact")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def begun(tmp_path):
    """The run directory with one step."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "critic/score/mean": 0.5}\n')
    return tmp_path / "run"


def data_of(directory) -> dict:
    text = (directory / "report.html").read_text()
    return json.loads(re.search(r'id="data">([^<]*)</script>', text)[1])


def test_the_last_line_names_a_report_of_all_that_was_done(overrides, metrics, lines, tmp_path):
    assert run(load_config(overrides(REPORT, "trainer.samples_per_step=2"))) == 0
    assert lines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    data = data_of(tmp_path / "run")
    curves = {trace.get("name"): trace for figure in data["figures"] for trace in figure["data"]}
    assert curves["critic/score/mean"]["x"] == [1, 2, 3]
    assert curves["perf/cpu_memory_used_gb"]["y"][0] > 0
    assert metrics()[0]["perf/cpu_memory_used_gb"] > 0
    shown = data["samples"][0]["shown"]
    assert [(one["step"], len(one["samples"])) for one in shown] == [(1, 2), (2, 2), (3, 2)]
    for sample in (sample for one in shown for sample in one["samples"]):
        assert len(sample["tokens"]) == sample["num_tokens"]
        assert sum(length for length, _ in sample["tokens"]) == len(sample["response"])
        assert all(logprob <= 0 for _, logprob in sample["tokens"])


def test_a_run_that_a_mismatch_stops_shows_it(overrides, lines, monkeypatch, tmp_path):
    monkeypatch.setattr(driver_module, "require_certificate", lambda *_, **__: None)  # it would stop it before
    more = ("actor_rollout_ref.rollout.mismatch.mode=noise", "trainer.exactness=strict")
    with pytest.raises(ExactnessError):
        run(load_config(overrides(REPORT, *more)))
    assert lines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    curves = [trace for figure in data_of(tmp_path / "run")["figures"] for trace in figure["data"]]
    (different,) = (trace for trace in curves if trace.get("name") == "bitwise/tokens_different")
    assert different["y"][0] > 0
    (shown,) = data_of(tmp_path / "run")["samples"][0]["shown"]
    marked = sum(len(token) == 3 for sample in shown["samples"] for token in sample["tokens"])
    assert 0 < marked <= different["y"][0], "the step that stopped the run is there, and which tokens differ"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a\nb"), MemoryError()])
def test_a_report_that_fails_costs_one_line(overrides, lines, begun, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(final_report, "write_report", fail)
    with final_report.final_report(load_config(overrides(REPORT)), Reporter([], tmp_path)):
        pass
    (line,) = lines()
    assert line.startswith(f"no report: {type(error).__name__}")
    assert "\n" not in line


def test_what_a_report_lacks_is_named(overrides, lines, begun, tmp_path, monkeypatch):
    with final_report.final_report(load_config(overrides(REPORT, "trainer.logger=[console]")), Reporter([], tmp_path)):
        pass
    monkeypatch.setitem(page_module.__dict__, "render", lambda _: (_ for _ in ()).throw(page_module.MissingPlotlyError))
    with final_report.final_report(load_config(overrides(REPORT)), Reporter([], tmp_path)):
        pass
    with final_report.final_report(load_config(overrides("trainer.report=false")), Reporter([], tmp_path)):
        pass
    assert lines() == [
        "no report: trainer.logger does not name jsonl, which it is made from",
        "no report: a report needs the package plotly: pip install 'vexact[report]'",
    ]
    assert not (begun / "report.html").exists()


def test_an_interrupt_is_not_kept_waiting(overrides, lines, begun, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        final_report.final_report(load_config(overrides(REPORT)), Reporter([], tmp_path)),
    ):
        raise KeyboardInterrupt
    assert lines() == []


def test_samples_that_cannot_be_written_cost_a_line_and_not_the_run(overrides, metrics, lines, tmp_path, monkeypatch):
    def on_a_full_disk(run_dir, step, *rest, **named):
        if step > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_samples(run_dir, step, *rest, **named)

    monkeypatch.setattr(samples, "write_samples", on_a_full_disk)
    assert run(load_config(overrides("trainer.samples_per_step=2"))) == 0
    assert [row["step"] for row in metrics()] == [1, 2, 3]
    lost = [line for line in lines() if line.startswith("samples of step")]
    assert lost == ["samples of step 2 cannot be written, training goes on: [Errno 28] No space left on device"]
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == ["step_1.jsonl"]
