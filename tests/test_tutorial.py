"""docs/tutorial.md does what it says: its files are written, its commands run, in order, in an empty folder."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from headless import Drawn, opened
from processes import PATIENCE_S
from stand_ins import executable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vexact.report.sinks.jsonl import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return [(language, textwrap.dedent(text)) for _, language, text in BLOCK.findall(PAGE)]


def test_the_page_shows_no_command_that_is_not_run() -> None:
    assert {language for language, _ in blocks()} == {"bash", "python", "yaml"}
    assert PAGE.count("```") == 2 * len(blocks())
    for language, text in blocks():
        assert language == "bash" or re.match(r"# [\w.]+\n", text), "a file says its name"
    prose = BLOCK.sub("", PAGE)
    spans = re.findall(r"`([^`]+)`", prose)
    assert [span for span in spans if re.match(r"(vexact|python3?|bash|pip|tensorboard|wandb|\$) ", span)] == []


def test_links_of_the_page_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE)
    assert len(targets) > 8
    assert [target for target in targets if not (ROOT / "docs" / target).is_file()] == []


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder after all of the page, and what each command printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    tools = tmp_path_factory.mktemp("tools")
    executable(tools / "vexact", f'exec "{sys.executable}" -m vexact "$@"\n')
    executable(tools / "python", f'exec "{sys.executable}" "$@"\n')
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "VEXACT"))} | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": search,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }
    said = {}
    for language, text in blocks():
        if language != "bash":
            (folder / text.split("\n")[0].removeprefix("# ")).write_text(text, encoding="utf-8")
            continue
        command = ["bash", "-euo", "pipefail", "-c", text]
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert result.returncode == 0, f"{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        said[text.strip()] = result.stdout + result.stderr
    return folder, said


SAID = {  # of every command: what finds it, and what it has to print
    r"prepare": ["preparing tiny"],
    r"^python": [],
    r"--dry_run": ["run directory    runs/first", "data             train.jsonl"],
    r"^vexact train recipe=first.yaml$": ["self-test: ", " 0 different", "report: runs/first/report.html"],
    r"^vexact report runs/first$": ["runs/first/report.html"],
    r"compared.html$": ["report: runs/faster/report.html", "\ncompared.html\n"],
    r"verify --model_path": ["EXACT: all "],
    r"generate": [],
    r"exactness=strict": [
        "linear of layers.0.attention.qkv_proj differs first",
        "exit code 2",
        "runs/broken/divergence.pt",
    ],
    r"--replay": ["linear of layers.0.attention.qkv_proj", "exit code 1"],
    r"exactness=warn": ["rollout and trainer disagree", "report: runs/corrected/report.html"],
}


def test_every_command_does_what_the_page_says(done: tuple[Path, dict[str, str]]) -> None:
    folder, said = done
    found = {form: [text for command, text in said.items() if re.search(form, command)] for form in SAID}
    assert [form for form, texts in found.items() if len(texts) != 1] == []
    assert len(said) == len(SAID), "a command that nothing is expected of"
    missing = {form: [part for part in parts if part not in found[form][0]] for form, parts in SAID.items()}
    assert {form: parts for form, parts in missing.items() if parts} == {}
    rewards = [row["critic/score/mean"] for row in read_metrics(folder / "runs/first/metrics.jsonl") if row["step"]]
    assert sum(rewards[-3:]) > sum(rewards[:3]), "the reward rises"
    corrected = read_metrics(folder / "runs/corrected/metrics.jsonl")[-1]
    assert corrected["bitwise/tokens_different"] > 0
    assert corrected["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-3)
    events = EventAccumulator(str(folder / "runs/first/tensorboard")).Reload()
    assert {"samples/val/text_summary", "samples/step/text_summary"} <= set(events.Tags()["tensors"])
    assert [event.step for event in events.Scalars("critic/score/mean")] == list(range(1, 11))
    assert {path.name for path in folder.glob("*.html")} == {"compared.html"}


@pytest.mark.browser
@pytest.mark.parametrize(
    ("page", "pictures"), [("runs/first/report.html", 25), ("runs/corrected/report.html", 25), ("compared.html", 25)]
)
def test_its_reports_are_drawn(
    done: tuple[Path, dict[str, str]], browser: str, page: str, pictures: int, tmp_path: Path
):
    document, console = opened(browser, f"{(done[0] / page).as_uri()}#all", tmp_path / "page.png")
    assert console == ""
    shapes = Drawn(document).shapes
    assert len(shapes) >= pictures
    assert [figure for figure, count in shapes.items() if not count] == []


@pytest.mark.browser
def test_the_report_of_the_broken_run_says_where_it_broke(
    done: tuple[Path, dict[str, str]], browser: str, tmp_path: Path
):
    document, console = opened(browser, (done[0] / "runs/broken/report.html").as_uri(), tmp_path / "page.png")
    assert console == ""
    assert "first divergence: operator: linear of layers.0.attention.qkv_proj differs first" in document
