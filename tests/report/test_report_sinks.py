import errno
import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from vexact.report import Reporter, write_samples
from vexact.report.sinks.console import HEADER_EVERY, ConsoleSink
from vexact.report.sinks.jsonl import JsonlSink, read_metrics
from vexact.report.sinks.sink import RunInfo
from vexact.types import Prompt, Sample, SampleGroup, Score, StepStats

ROW = {
    "critic/score/mean": 0.28125,
    "response_length/mean": 3.02,
    "actor/entropy": 1.234,
    "actor/grad_norm": 0.567,
    "bitwise/tokens_compared": 262144.0,
    "bitwise/tokens_different": 0.0,
    "timing_s/gen": 1.5,
    "timing_s/update_actor": 2.25,
    "perf/throughput": 1234.4,
}


def plain_console(run, **options):
    text = io.StringIO()
    return ConsoleSink(run, Console(file=text, highlight=False, **{"width": 60, **options})), text


def test_unknown_logger_lists_the_known(tmp_path):
    with pytest.raises(
        ValueError, match=r"trainer\.logger names 'mlflow', which is unknown; use console, jsonl, wandb"
    ):
        Reporter(["console", "mlflow"], tmp_path)


@pytest.mark.parametrize(("logger", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, logger, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"package {logger} is not installed: pip install 'vexact\[{logger}\]'"):
        Reporter(["jsonl", logger], tmp_path)


def test_jsonl_has_one_flushed_object_per_step(tmp_path):
    with Reporter(["jsonl"], tmp_path / "run") as reporter:
        reporter.log(StepStats(1, {"a/b": 0.5, "c": float("nan"), "d": float("inf")}))
        (record,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert record.pop("time") > 1.6e9
    assert record == {"step": 1, "a/b": 0.5, "c": None, "d": None}


class Full:
    """A file on a disk that is full at times; it takes a part of a line before it says so."""

    def __init__(self, file):
        self.file, self.is_full, self.room = file, False, 7

    def write(self, content):
        if self.is_full and not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(bytes(content[: self.room if self.is_full else None]))
        self.room -= taken if self.is_full else 0
        return taken

    def close(self):
        self.file.close()


def test_a_disk_that_was_full_for_a_while_costs_no_line(tmp_path, caplog):
    sink = JsonlSink(RunInfo(tmp_path))
    sink._file = disk = Full(sink._file)
    for step in range(1, 7):
        disk.is_full = step in (2, 3, 4)
        sink.step(StepStats(step, {"a": float(step)}))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == (2 if disk.is_full else step)  # the first one, and the beginning of the second
    assert [(one["step"], one["a"]) for one in read_metrics(tmp_path / "metrics.jsonl")] == [
        (step, float(step)) for step in range(1, 7)
    ]
    told = [record.getMessage().partition("metrics.jsonl ")[2] for record in caplog.records]
    assert [text[:20] for text in told] == ["takes no more, train", "is complete again"]
    disk.is_full, disk.room = True, 0
    sink.step(StepStats(7, {}))
    with pytest.raises(OSError, match="No space left"):
        sink.close()
    assert disk.file.closed


def test_resumed_jsonl_continues_without_duplicates(tmp_path):
    with Reporter(["jsonl"], tmp_path) as reporter:
        for step in range(1, 6):
            reporter.log(StepStats(step, {"value": float(step)}))
    path = tmp_path / "metrics.jsonl"
    before = read_metrics(path)
    path.write_text(path.read_text() + '{"step": 6, "val')  # killed while writing
    with Reporter(["jsonl"], tmp_path, resume_step=3) as reporter:
        for step in range(4, 7):
            reporter.log(StepStats(step, {"value": float(10 * step)}))
    records = read_metrics(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[:3] == before[:3]
    assert [record["value"] for record in records[3:]] == [40.0, 50.0, 60.0]


def test_a_new_run_keeps_the_old_file(tmp_path):
    for value in (1.0, 2.0, 3.0):
        with Reporter(["jsonl"], tmp_path) as reporter:
            reporter.log(StepStats(1, {"value": value}))
    values = [
        read_metrics(tmp_path / name)[0]["value"] for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    ]
    assert values == [1.0, 2.0, 3.0]


def test_broken_jsonl_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not valid JSON"):
        Reporter(["jsonl"], tmp_path, resume_step=1)


@pytest.mark.parametrize("line", [b"{}", b"[1]", b'{"step": "3"}', b'{"step": true}', b"", b"\xff", b"\0\0\0"])
def test_a_run_does_not_go_on_over_a_line_that_is_no_record(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is .*; remove the line, or move the file away"):
        Reporter(["jsonl"], tmp_path, resume_step=2)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b'\n{"step": 2}\n'


def test_plain_rows_align_and_show_the_mismatch(tmp_path):
    sink, text = plain_console(RunInfo(tmp_path, total_steps=120))
    sink.step(StepStats(1, ROW))
    sink.step(StepStats(2, {**ROW, "bitwise/tokens_different": 17.0, "critic/score/mean": -0.5}))
    sink.step(StepStats(3, {"critic/score/mean": 1.0}))
    header, first, second, third = text.getvalue().splitlines()
    end = header.index("mismatch") + len("mismatch")
    assert first[:end].endswith(" 0 / 262144")
    assert second[:end].endswith(" 17 / 262144")
    assert third[:end].endswith("not compared")
    assert len({len(line) for line in (header, first, second, third)}) == 1
    assert first.split()[:5] == ["1/120", "0.281", "3.0", "1.234", "0.567"]
    assert first.split()[-4:-1] == ["1.50", "2.25", "1234"]
    assert "\x1b" not in text.getvalue()


def test_the_remaining_time_forgets_the_first_step(tmp_path, monkeypatch):
    clock = iter([0.0, 60.0, 62.0, 64.0])  # the start, then the end of each step
    monkeypatch.setattr("vexact.report.sinks.console.monotonic", lambda: next(clock))
    sink, text = plain_console(RunInfo(tmp_path, total_steps=13))
    for step in (1, 2, 3):
        sink.step(StepStats(step, ROW))
    assert [line.split()[-1] for line in text.getvalue().splitlines()[1:]] == ["0:12:00", "0:00:22", "0:00:20"]


def test_header_is_repeated(tmp_path):
    sink, text = plain_console(RunInfo(tmp_path))
    for step in range(1, 2 * HEADER_EVERY + 2):
        sink.step(StepStats(step, ROW))
    lines = text.getvalue().splitlines()
    assert [number for number, line in enumerate(lines) if "mismatch" in line] == [
        0,
        HEADER_EVERY + 1,
        2 * HEADER_EVERY + 2,
    ]


def test_plain_plan_stages_and_validation(tmp_path):
    sink, text = plain_console(RunInfo(tmp_path, total_steps=3))
    sink.plan([("step", "16 prompts x 8 samples"), ("run directory", "runs/[demo]")], ["raise the page count"])
    sink.stage(1, "step")
    sink.stage(1, "gen")
    sink.stage(1, "reward")
    sink.stage(1, "gen")
    sink.step(StepStats(1, ROW))
    sink.stage(2, "gen")
    sink.step(StepStats(2, {"val-core/add/acc/mean@1": 0.8125}))
    sink.step(StepStats(3, ROW | {"val-core/add/acc/mean@1": 0.9}))
    lines = text.getvalue().splitlines()
    assert lines[:5] == [
        "step           16 prompts x 8 samples",
        "run directory  runs/[demo]",
        "note: raise the page count",
        "step 1: gen ...",
        "step 1: reward ...",
    ]
    assert lines[7:] == [
        "step 2: val-core/add/acc/mean@1 = 0.8125",
        lines[8],
        "step 3: val-core/add/acc/mean@1 = 0.9000",
    ]
    assert lines[8].split()[0] == "3/3"


def test_terminal_shows_live_stage_and_progress(tmp_path):
    sink, text = plain_console(RunInfo(tmp_path, total_steps=4), force_terminal=True, width=160)
    sink.plan([("run directory", "runs/demo")], [])
    sink.stage(1, "gen")
    sink.stage(1, "update_actor")
    sink.step(StepStats(1, ROW))
    sink._progress.refresh()
    sink.close()
    sink.close()
    shown = text.getvalue()
    for expected in ("runs/demo", "step 1 · update_actor", "0 / 262144", "1/4"):
        assert expected in shown


def test_tensorboard_writes_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step in (None, 1):
        with Reporter(["tensorboard"], tmp_path, resume_step=resume_step) as reporter:
            for step in (1, 2) if resume_step is None else (2, 3):
                reporter.log(StepStats(step, {"critic/score/mean": step + (resume_step or 0) / 2}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("critic/score/mean")]
    assert found == [(1, 1.0), (2, 2.5), (3, 3.5)]


def test_wandb_runs_offline_and_keeps_its_id(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for resume_step in (None, 1):
        with Reporter(
            ["wandb"], tmp_path, project="p", experiment="e", config={"a": 1}, resume_step=resume_step
        ) as reporter:
            reporter.log(StepStats(2 if resume_step else 1, {"critic/score/mean": 0.5}))
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert folders
    # of two that start within a second, W&B gives the later one's folder a suffix
    assert all(run_id in folder.name for folder in folders), folders
    assert sum(len(list(folder.glob("*.wandb"))) for folder in folders) == len(folders)


def test_a_new_wandb_run_gets_a_new_id(tmp_path, monkeypatch):
    import types

    calls = []
    run = types.SimpleNamespace(finish=lambda: None, define_metric=lambda *a, **k: None)
    fake = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run, Settings=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resume_step in (None, 4, None):
        Reporter(["wandb"], tmp_path, resume_step=resume_step).close()
    ids = [call["id"] for call in calls]
    assert ids[0] == ids[1] != ids[2]
    assert {(call["mode"], call["resume"], call["dir"]) for call in calls} == {("offline", "allow", str(tmp_path))}


class FakeWandb:
    """W&B that fails where it is told to: a mode of ``init``, "log" or "finish"."""

    Settings = dict

    def __init__(self, *failing):
        self.failing, self.modes, self.logged, self.num_teardowns = failing, [], [], 0

    def _do(self, what):
        if what in self.failing:
            raise RuntimeError(f"{what} failed\nin many lines")

    def init(self, **kwargs):
        self.modes.append(kwargs["mode"])
        assert kwargs["settings"]["init_timeout"] <= 15
        self._do(kwargs["mode"])
        return self

    def define_metric(self, name, **options):
        self._do("define_metric")

    def log(self, metrics):
        self._do("log")
        self.logged.append(metrics["training/global_step"])

    def finish(self):
        self._do("finish")

    def teardown(self):
        self.num_teardowns += 1
        self._do("teardown")


def reported(fake, tmp_path, monkeypatch, mode):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", mode)
    with Reporter(["jsonl", "wandb"], tmp_path) as reporter:
        for step in (1, 2, 3):
            reporter.log(StepStats(step, {"value": 1.0}))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3, "the run went on"
    return fake


@pytest.mark.parametrize("failing", [("online",), ("online", "teardown"), ("online", "finish")])
def test_wandb_that_cannot_be_reached_writes_offline(tmp_path, monkeypatch, caplog, failing):
    fake = reported(FakeWandb(*failing), tmp_path, monkeypatch, "online")
    assert (fake.modes, fake.num_teardowns, fake.logged) == (["online", "offline"], 1, [1, 2, 3])
    assert caplog.messages[0] == (
        "W&B cannot be reached, so this run is written offline, for `wandb sync`: RuntimeError: online failed"
    )


def test_wandb_that_cannot_start_at_all_is_left_out(tmp_path, monkeypatch, caplog):
    fake = reported(FakeWandb("shared", "offline"), tmp_path, monkeypatch, "shared")
    assert (fake.modes, fake.logged) == (["shared", "offline"], [])
    assert caplog.messages[1:] == [
        "trainer.logger: wandb failed at the start and gets nothing more, training goes on: RuntimeError: "
        "RuntimeError: offline failed"
    ]


@pytest.mark.parametrize("failing", ["define_metric", "log", "finish"])
def test_wandb_that_fails_later_never_ends_the_run(tmp_path, monkeypatch, caplog, failing):
    fake = reported(FakeWandb(failing), tmp_path, monkeypatch, "offline")
    assert fake.logged == ([1, 2, 3] if failing == "finish" else [])
    assert len(caplog.messages) == 1
    assert f"{failing} failed in many lines" in caplog.text


def test_an_empty_wandb_mode_is_unset(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_ENTITY"):
        monkeypatch.setenv(name, "")
    with Reporter(["wandb"], tmp_path) as reporter:
        reporter.log(StepStats(1, {"value": 1.0}))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class Gone(io.StringIO):
    """A stream whose reader goes away after some writes."""

    def __init__(self, num_writes, error):
        super().__init__()
        self.left, self.error = num_writes, error

    def write(self, text):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("num_writes", [0, 1, 3])
def test_a_lost_console_is_said_once_and_training_goes_on(tmp_path, monkeypatch, caplog, number, num_writes):
    stream = Gone(num_writes, OSError(number, "gone"))
    monkeypatch.setattr(sys, "stdout", stream)
    sink = ConsoleSink(RunInfo(tmp_path, total_steps=9))
    sink.plan([("model", "m"), ("data", "d")], ["advice"])
    for step in range(1, 10):
        sink.stage(step, "gen")
        sink.step(StepStats(step, ROW))
    sink.close()
    assert len(caplog.messages) == 1
    assert "the console takes no more lines" in caplog.text
    assert stream.left == 0


def test_samples_are_dumped(tmp_path):
    values = np.zeros(2, np.float32)

    def sample(text=None):
        return Sample("req-1", (1, 2, 3), (7, 8), values, values, 1.0, "stop", 4, text=text)

    prompt = Prompt(3, (1, 2, 3), "1+1=", "add", "2")
    scores = (Score(1.0, {"acc": 1.0}), Score(0.0, status="error", message="boom"))
    groups = [SampleGroup(prompt, (sample("2"), sample()), scores)]
    path = write_samples(tmp_path, 5, groups, decode=lambda ids: "·".join(map(str, ids)))
    assert path == tmp_path / "samples/step_5.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {
        "row": 3, "data_source": "add", "prompt": "1+1=", "response": "2", "ground_truth": "2", "score": 1.0,
        "extra": {"acc": 1.0}, "status": "ok", "finish_reason": "stop", "num_prompt_tokens": 3, "num_tokens": 2,
        "weights_version": 4, "request_id": "req-1", "token_lengths": [0, 1], "logprobs": [0.0, 0.0],
    }  # fmt: skip
    assert (second["response"], second["message"]) == ("7·8", "boom")
    marked = write_samples(tmp_path, 8, groups, different={"req-1": [1], "other": []}).read_text().splitlines()
    assert [json.loads(line)["different"] for line in marked] == [[1], [1]]
    (tmp_path / "samples/step_8.jsonl").unlink()
    assert len(write_samples(tmp_path, 6, groups * 3, limit=3).read_text().splitlines()) == 3
    assert write_samples(tmp_path, 7, groups, limit=0) is None
    assert sorted(file.name for file in path.parent.iterdir()) == ["step_5.jsonl", "step_6.jsonl"]
