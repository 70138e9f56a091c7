"""The page holds what the runs hold: pictures, bands, tables, samples; as data, never as markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from plotly import graph_objects as go
from written_run import config, group, row, write_run

from vexact.cli import main
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.report import write_samples
from vexact.report.html import read_run, write_report
from vexact.report.html.browser import BYTES_OF_ALL, sample_pages
from vexact.report.html.groups import grouped
from vexact.report.html.page import render
from vexact.report.html.thin import kept_points, running_mean, stretch_means
from vexact.report.panels import SECTIONS
from vexact.report.samples.token_text import TokenText

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028&lt;"


class Page(HTMLParser):
    """What a browser's parser makes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def page_of(*directories) -> Page:
    return Page(render([read_run(directory) for directory in directories]))


def curve(page: Page, metric: str, index: int = 0) -> dict:
    """The main line of a metric that stands alone in its picture."""
    return [trace for figure in page.data["figures"] for trace in figure["data"] if trace.get("name") == metric][index]


def test_a_run_is_shown_whole(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert curve(page, "critic/score/mean")["y"] == [0.01, 0.02, 0.03, 0.04]
    assert curve(page, "bitwise/tokens_compared")["y"] == [100, 200, 300, 400]
    assert curve(page, "perf/max_memory_allocated_gb")["y"] == [2.5] * 4
    traces = [trace for figure in page.data["figures"] for trace in figure["data"]]
    bars = {trace["name"]: trace["y"] for trace in traces if trace["type"] == "bar"}
    assert list(bars) == ["gen", "reward", "adv", "update_actor", "update_weights", "other"]
    assert np.sum([bars[name] for name in bars], axis=0) == pytest.approx([1.0] * 4)
    for title in SECTIONS:
        assert title in page.text
    for fact in ("4 of 4", "0 / 400", "0 / 24", "yes, bit for bit", "0 in every step, as it has to be", "2.13.0"):
        assert fact in page.text
    assert "actor_rollout_ref.actor.optim.lr" in page.text
    sample = page.data["samples"][0]["shown"][0]["samples"][0]
    assert sample["tokens"] == [[1, -0.5], [4, -2.25], [0, None]]
    assert (sample["prompt"], sample["response"], sample["score"]) == ("2+2=", "4 two", 1.0)


def test_every_figure_is_one_that_plotly_accepts(tmp_path):
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    assert len(page.data["figures"]) == sum(tag == "div" and "data-figure" in has for tag, has in page.elements) > 15
    for figure in page.data["figures"]:
        assert go.Figure(figure, skip_invalid=False).data
        assert all(len(trace["x"]) == len(trace["y"]) > 0 for trace in figure["data"])


def test_a_mismatch_is_seen(tmp_path):
    page = page_of(write_run(tmp_path / "run", [row(step, different=int(step == 3)) for step in (1, 2, 3, 4)]))
    assert "1 / 400" in page.text
    assert "not 0 in 1 of 4 values" in page.text
    assert curve(page, "bitwise/tokens_different")["y"] == [0, 0, 1, 0]


def test_the_page_needs_nothing_and_runs_its_own_scripts_only(tmp_path):
    text = write_report([read_run(write_run(tmp_path / "run"))], tmp_path / "report.html").read_text()
    page = Page(text)
    assert all(value[0] == "#" for _, has in page.elements for key, value in has.items() if key in ("src", "href"))
    policy = next(has["content"] for tag, has in page.elements if tag == "meta" and "http-equiv" in has)
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    ran = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert allowed == ran
    assert len(ran) == 2
    assert len(text) < 6e6


def test_text_of_models_and_files_is_never_markup(tmp_path):
    rows = [row(1) | {f"val-core/{HOSTILE}/acc/mean@1": 0.5}]
    settings = config(experiment_name=HOSTILE) | {HOSTILE: HOSTILE}
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", rows, settings, response="4" + HOSTILE)
    harmless = page_of(write_run(tmp_path / "run", [row(1)], config(experiment_name="x") | {"y": "z"}))
    page = page_of(run)
    assert len(page.scripts) == 3
    assert page.scripts[1:] == harmless.scripts[1:]
    assert [tag for tag, _ in page.elements if tag in ("img", "script", "iframe", "object", "svg")] == ["script"] * 3
    assert not [key for _, has in page.elements for key in has if key.startswith("on")]
    assert page.data["samples"][0]["shown"][0]["samples"][0]["response"] == "4" + HOSTILE
    assert not any("<img" in json.dumps(figure) or "<script" in json.dumps(figure) for figure in page.data["figures"])


def test_runs_that_differ_in_the_seed_are_one_line_with_a_band(tmp_path):
    runs = [write_run(tmp_path / f"run{seed}", seed=seed, experiment_name=f"run{seed}") for seed in range(3)]
    (together,) = grouped([read_run(run) for run in runs])
    assert together.num_seeds == 3
    band = together.band("critic/score/mean")
    assert band.mean == pytest.approx([0.11, 0.12, 0.13, 0.14])
    half = 4.303 * 0.1 / 3**0.5  # Student's t for two degrees of freedom, standard deviation 0.1
    assert band.high - band.mean == pytest.approx([half] * 4, rel=1e-4)
    assert band.mean - band.low == pytest.approx([half] * 4, rel=1e-4)


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    runs = [read_run(write_run(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    band = grouped(runs)[0].band("critic/score/mean")
    assert band.mean[0] == pytest.approx((0.01 + 0.11) / 2)
    alone = grouped(runs[:2])[0]
    assert alone.num_seeds == 1
    assert not alone.band("critic/score/mean").has_interval


def test_configurations_that_differ_are_apart_and_say_in_what(tmp_path):
    other = config(seed=1)
    other["actor_rollout_ref"]["actor"]["optim"]["lr"] = 0.5
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=other), write_run(tmp_path / "c", seed=2)]
    groups = grouped([read_run(run) for run in runs])
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("lr=0.001", ["a", "c"]),
        ("lr=0.5", ["b"]),
    ]
    page = page_of(*runs)
    marked = [has for tag, has in page.elements if tag == "td" and has.get("class") == "differs"]
    assert len(marked) >= 3 * 2  # seed and learning rate, of three runs
    assert "lr=0.001" in page.text


def test_seeds_of_different_lengths_meet_where_they_can(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", [row(step, 1) for step in (1, 2)], seed=1)]
    band = grouped([read_run(run) for run in runs])[0].band("critic/score/mean")
    assert band.mean == pytest.approx([0.06, 0.07, 0.03, 0.04])
    assert np.isfinite(band.low).tolist() == [True, True, False, False]


def test_a_long_run_keeps_its_peaks_and_stays_small(tmp_path):
    rows = [row(step, different=int(step == 7_654)) for step in range(1, 10_001)]
    run = write_run(tmp_path / "run", rows)
    for step in range(5, 1500):
        write_samples(run, step, [group("4" + "long " * 400)], decode=lambda ids: "")
    text = render([read_run(run)])
    assert len(text) < 8e6
    page = Page(text)
    peak = curve(page, "bitwise/tokens_different")
    assert len(peak["y"]) <= 1000
    assert peak["x"][peak["y"].index(1)] == 7_654
    shown = page.data["samples"][0]
    assert shown["files"] == 1496
    assert 2 < len(shown["shown"]) <= 200
    assert [shown["shown"][0]["step"], shown["shown"][-1]["step"]] == [4, 1499]


def test_the_samples_of_all_runs_together_fit(tmp_path):
    for name in ("a", "b"):
        run = write_run(tmp_path / name)
        for step in range(5, 25):
            write_samples(run, step, [group("4" + "x" * 7000)] * 64)
    pages = sample_pages([read_run(tmp_path / name) for name in ("a", "b")])
    assert 0.5 * BYTES_OF_ALL < len(json.dumps(pages)) < 1.05 * BYTES_OF_ALL
    assert all(len(page["shown"]) >= 2 for page in pages)


def test_few_points_keep_the_extremes():
    values = np.random.default_rng(0).normal(size=5000)
    values[[1234, 4321]] = 50, -50
    kept = kept_points(values, 100)
    assert len(kept) <= 100
    assert {0, 1234, 4321, 4999} <= set(kept.tolist())
    assert kept_points(np.full(9, np.nan), 4).tolist() == [0, 8]
    assert stretch_means(np.arange(10.0), 5).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]


@pytest.mark.parametrize(
    ("words", "text", "lengths"),
    [
        (["a", "b c", "<end>"], "ab c", [1, 3, 0]),
        (["\ufffd", "\ufffd", "!"], "é!", [0, 1, 1]),
        (["\ufffd", "\ufffd", "<end>"], "é", [0, 1, 0]),
        (["Hi", "there", "."], "Hi there.", [2, 6, 1]),  # a tokenizer that drops a space at the start
        (["<think>", "a"], "a", [0, 1]),
        (["a", "a", "a"], "aaa", [1, 1, 1]),
        (["x", "stop"], "x", [1, 0]),
        (["x"], "quite another text", [18]),
        ([], "", []),
    ],
)
def test_tokens_share_the_characters_of_the_text(words, text, lengths):
    whole = {("\ufffd", "\ufffd"): "é", ("\ufffd", "\ufffd", "!"): "é!"}  # what tokens say together and not alone

    def decode(ids):
        said = tuple(words[i] for i in ids)
        return whole.get(said, "".join(said))

    found = TokenText(decode).lengths(range(len(words)), text)
    assert found == lengths
    assert sum(found) == len(text)


@pytest.mark.parametrize("text", ["日本語の😀é", "aé b日 c", "🤖🤖", "é"])
def test_a_character_is_of_the_token_that_completes_it(text):
    """One token per byte: a log-probability stands beside the character that its token ends, and no other."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = TokenText(tokenizer.decode).lengths([*ids, tokenizer.eos_token_id], text)
    ends = [0] * len(ids)
    for size in (len(text[: n + 1].encode()) for n in range(len(text))):
        ends[size - 1] = 1
    assert found == [*ends, 0]


def test_a_peak_is_gone_from_the_mean_that_runs_past_it():
    """What is left of 1e18 - 1e18 is no mean of numbers around 1."""
    values = np.full(12, 1.0)
    values[2] = 1e18
    assert running_mean(values, 3)[5:].tolist() == [1.0] * 7
    values[4], values[9] = np.nan, np.inf
    for window in (1, 2, 5, 12, 99):
        parts = [values[max(0, end - window) : end] for end in range(1, 13)]
        kept = [part[np.isfinite(part)] for part in parts]
        expected = [part.mean() if len(part) else np.nan for part in kept]
        assert np.allclose(running_mean(values, window), expected, equal_nan=True)


def test_the_order_of_keys_sets_no_runs_apart(tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(dict(reversed(config.items())), sort_keys=False))
    assert len(grouped([read_run(run) for run in runs])) == 1


def test_the_command_names_the_file(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), str(run / "metrics.jsonl")]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert len(Page((run / "report.html").read_text()).data["samples"]) == 1  # one run, named twice
    other = write_run(tmp_path / "other", seed=1)
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert len(Page((tmp_path / "both.html").read_text()).data["samples"]) == 2
