"""The page in a real browser: every picture is drawn, nothing is fetched, no text of a model runs."""

import json

import pytest
from headless import Drawn, opened
from PIL import Image
from test_report_html import HOSTILE
from written_run import config, row, write_run

from vexact.report.html import read_run, write_report

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("kind", ["finished", "killed", "mismatching", "five", "hostile"])
def test_every_picture_is_drawn(browser, tmp_path, kind):
    if kind == "five":
        runs = [write_run(tmp_path / f"seed{seed}", seed=seed) for seed in range(4)]
        other = config()
        other["actor_rollout_ref"]["rollout"]["mismatch"]["mode"] = "noise"
        runs.append(write_run(tmp_path / "noise", [row(step, different=9) for step in range(1, 5)], other))
    elif kind == "hostile":
        rows = [row(1) | {f"val-core/{HOSTILE}/acc/mean@1": 0.5}]
        runs = [write_run(tmp_path / "run", rows, config() | {HOSTILE: HOSTILE}, response="4" + HOSTILE)]
    else:
        rows = [row(step, different=3 * (kind == "mismatching")) for step in range(1, 5)]
        different = {"a": [1]} if kind == "mismatching" else None
        runs = [write_run(tmp_path / "run", rows, total_training_steps=4, different=different)]
        if kind == "mismatching":
            (runs[0] / "divergence.txt").write_text(f"first divergence: {HOSTILE}")
        if kind == "killed":
            with (runs[0] / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row(5))[:50])
    page, screenshot = tmp_path / "report.html", tmp_path / "page.png"
    address = write_report([read_run(run) for run in runs], page).as_uri()
    document, console = opened(browser, f"{address}#all", screenshot)
    assert console == ""
    drawn = Drawn(document)
    assert drawn.title.endswith(" · vexact")
    assert not drawn.tags & {"img", "iframe", "object"}
    assert len(drawn.shapes) >= 16
    assert [figure for figure, shapes in drawn.shapes.items() if not shapes] == []
    assert 'class="sample"' in document
    assert document.count('class="differs-here"') == (kind == "mismatching")
    assert ("first divergence: " in document) == (kind == "mismatching")
    with Image.open(screenshot) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0x2A, 0x6F, 0xBB), (0xD9, 0x73, 0x1A), (0x2B, 0x8A, 0x5F)} <= colours


def test_pictures_are_drawn_as_they_come_near(browser, tmp_path):
    address = write_report([read_run(write_run(tmp_path / "run"))], tmp_path / "report.html").as_uri()
    for _ in range(4):  # a browser without a window may end before it has looked at what is in sight
        document, console = opened(browser, address, tmp_path / "page.png")
        assert console == ""
        shapes = Drawn(document).shapes.values()
        if all(shapes):
            break
    assert len(shapes) >= 16
    assert all(shapes)
