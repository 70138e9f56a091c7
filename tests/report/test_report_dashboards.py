"""What W&B and TensorBoard are given, read back with what they read it with."""

import json
import logging
from html import unescape

import numpy as np
import pytest
from wandb_file import definitions, history
from written_run import group, row, write_run

from vexact.report import Reporter
from vexact.report.html import read_run, write_report
from vexact.report.names import is_expected_zero
from vexact.report.panels import SECTIONS, present_panels
from vexact.report.reporter import SINKS
from vexact.report.samples.table import COLUMNS, sample_rows
from vexact.report.sinks.sink import Sink
from vexact.report.summaries import summary_of
from vexact.types import SampleGroup, Score, StepStats

HOSTILE = "<img src=x onerror=alert(1)> | [a](javascript:b) `c` **d**\n\n# e"
METRICS = {name: float(value) for name, value in row(1).items() if name not in ("step", "time")}


def decode(ids):
    return "4 two"


def test_wandb_gets_the_groups_summaries_tables_and_the_page(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    page = write_report([read_run(write_run(tmp_path / "other"))], tmp_path / "report.html")
    rows = sample_rows([group(HOSTILE)], decode, {"a": [1, 2]})
    for resume_step in (None, 1):
        with Reporter(["wandb"], tmp_path, resume_step=resume_step) as reporter:
            reporter.log(StepStats(1 if resume_step is None else 2, METRICS))
            reporter.samples(2, "val", rows)
            reporter.log(StepStats(3, METRICS | {"val-core/late/acc/mean@1": 0.5, "reward/a*b/mean": 0.25}))
            reporter.page(page)
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    assert all(run_id in file.name for file in files)
    defined = definitions(files[0])
    shown = [name for panels in present_panels(METRICS).values() for panel in panels.values() for name in panel]
    assert list(defined)[1 : len(shown) + 1] == list(dict.fromkeys(shown)), "in the order of the report"
    assert defined["bitwise/tokens_different"] == ("training/global_step", ("max",))
    assert defined["training/rollout_probs_diff_max"] == ("training/global_step", ("max",))
    assert defined["critic/score/mean"] == ("training/global_step", ("last", "max"))
    assert defined["timing_s/gen"] == ("training/global_step", ("mean",))
    assert set(METRICS) < set(defined)
    first, table, late, last = history(files[0])
    assert {name: first[name] for name in METRICS} == METRICS
    assert [one["training/global_step"] for one in (first, table, late, last)] == [1, 2, 3, 3]
    assert (late["val-core/late/acc/mean@1"], late["reward/a*b/mean"]) == (0.5, 0.25)
    folder = files[0].parent / "files"
    stored = json.loads((folder / table["samples/val/path"]).read_text())
    assert stored["columns"] == ["step", *COLUMNS]
    assert stored["data"] == [[2, "2+2=", HOSTILE, 1.0, "4", 3, None, "2 of 3: 1, 2"]]
    assert (folder / last["report/path"]).read_text() == page.read_text(), "nothing is put into the page"
    assert history(files[1])[0]["training/global_step"] == 2, "a repeated step is no step back"


def test_tensorboard_gets_the_groups_and_tables(tmp_path):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
    from tensorboard.plugins.text.text_plugin import TextPlugin

    with Reporter(["tensorboard", "jsonl"], tmp_path) as reporter:
        reporter.log(StepStats(1, METRICS))
        reporter.samples(2, "val", sample_rows([group(HOSTILE)], decode, {"a": [1]}))
        reporter.log(StepStats(2, METRICS | {"val-core/late/acc/mean@1": 0.5}))
    with Reporter(["tensorboard", "jsonl"], tmp_path, resume_step=2) as reporter:
        reporter.log(StepStats(3, METRICS))
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path / "tensorboard"))
    context = TBContext(data_provider=provider, multiplexer=multiplexer)
    scalars = ScalarsPlugin(context)
    context.plugin_name_to_instance = {"scalars": scalars}
    plugin = CustomScalarsPlugin(context)
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    found = {category["title"]: [chart["title"] for chart in category["chart"]] for category in layout["category"]}
    everything = METRICS.keys() | {"val-core/late/acc/mean@1"}
    expected = present_panels(everything)
    assert found == {section: list(panels) for section, panels in expected.items()}
    assert list(found) == [section for section in SECTIONS if section in expected], "in the order of the report"
    for category in layout["category"]:
        for chart in category["chart"]:
            tags = set()
            for pattern in chart["multiline"]["tag"]:
                body = plugin.scalars_impl(RequestContext(), ".", pattern, "")
                assert body["regex_valid"]
                tags |= set(body["tag_to_events"])
            assert tags == set(expected[category["title"]][chart["title"]])
    (event,) = TextPlugin(context).text_impl(
        RequestContext(), ".", "samples/val/text_summary", "", enable_markdown=True
    )
    assert event["step"] == 2
    text = event["text"]
    assert {tag.split(">")[0] for tag in text.split("<")[1:]} <= {
        f"{slash}{tag}" for tag in ("table", "thead", "tbody", "tr", "th", "td") for slash in ("", "/")
    }
    assert f"<td>{HOSTILE.replace(chr(10), ' ⏎ ')}</td>" in unescape(text)


class Broken(Sink):
    """Fails in one method."""

    def __init__(self, method, run):
        self.calls = []
        if method == "__init__":
            raise OSError(28, "No space left\non device")
        setattr(self, method, self.fail)

    def fail(self, *_):
        self.calls.append(1)
        raise OSError(28, "No space left\non device")


@pytest.mark.parametrize("method", ["__init__", "plan", "stage", "step", "samples", "page", "close"])
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_fails_is_said_once_and_the_others_get_everything(tmp_path, monkeypatch, caplog, logger, method):
    made = []
    monkeypatch.setitem(SINKS, logger, lambda run: made.append(Broken(method, run)) or made[-1])
    with Reporter([logger, "jsonl"], tmp_path) as reporter:
        reporter.plan([("model", "m")])
        for step in (1, 2, 3):
            reporter.stage("gen")
            reporter.samples(step, "val", [])
            reporter.log(StepStats(step, {"a": 1.0}))
        reporter.page(tmp_path / "report.html")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"trainer.logger: {logger} failed")
    assert record.getMessage().endswith("training goes on: OSError: [Errno 28] No space left on device")
    assert sum(len(sink.calls) for sink in made) == (method != "__init__")


def test_the_record_of_the_run_has_to_open(tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "jsonl", lambda run: Broken("__init__", run))
    with pytest.raises(OSError, match="No space left"):
        Reporter(["jsonl"], tmp_path)


def test_what_has_to_be_zero_keeps_its_maximum():
    zero = [name for panels in SECTIONS.values() for panel in panels if panel.expected == 0 for name in panel.names]
    assert len(zero) >= 8
    assert [name for name in zero if not is_expected_zero(name) or summary_of(name) != "max"] == []
    assert [summary_of(name) for name in ("bitwise/tokens_nonfinite", "actor/nonfinite_tensors")] == ["max", "max"]
    assert summary_of("perf/max_memory_allocated_gb") == "max"


def test_tables_have_the_best_and_the_worst_and_what_differs_first():
    def several(number, *values):
        one = group("4 two", f"prompt {number}").samples[0]
        samples = [
            type(one)(
                f"{number}-{i}", (7, 8), (1, 2), one.logprobs[:2], one.min_logits[:2], 1.0, "stop", 3, text="4 two"
            )
            for i in range(len(values))
        ]
        prompt = group("4 two", f"prompt {number}").prompt
        return SampleGroup(prompt, tuple(samples), tuple(Score(value) for value in values))

    groups = [several(number, 0.5, 0.0, 1.0, 1.0) for number in range(100)]
    compared = {f"{number}-{i}": [] for number in range(80) for i in range(4)}
    rows = sample_rows(groups, decode, compared | {"70-1": [0]})
    assert [(one[0], one[2], one[6]) for one in rows[:3]] == [
        ("prompt 70", 0.0, "1 of 2: 0"),
        ("prompt 70", 1.0, "0 of 2"),
        ("prompt 0", 1.0, "0 of 2"),
    ]
    assert len({one[0] for one in rows}) == 24
    assert (rows[-1][0], rows[-1][6]) == ("prompt 99", "not compared")
    assert rows[0][5] == pytest.approx(np.mean([-0.5, -2.25]))
    (flat,) = sample_rows([several(0, 1.0, 1.0)], decode)
    assert flat[6] == "not compared"
    (long,) = sample_rows([group("é" * 5000)], decode)
    assert long[1].endswith("… (5000 characters)")
    (lone,) = sample_rows([group("\udc80")], decode)
    assert lone[1] == "\\udc80"
