"""The view that a W&B project is given: what the client would send, read back."""

import json
import os
import re
import sys

import pytest
from wandb_workspaces.workspaces import Workspace, internal
from written_run import row

from vexact.cli import main
from vexact.report.panels import SECTIONS, present_panels

METRICS = {name for name in row(1) if name not in ("step", "time")} | {"val-core/a/acc/mean@1", "reward/near/mean"}


def test_the_view_has_the_report_s_pictures_in_its_order(monkeypatch, capsys):
    sent = []
    answer = {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}
    monkeypatch.setattr(internal, "upsert_view2", lambda view: sent.append(view) or answer)
    monkeypatch.setattr(Workspace, "url", property(lambda self: f"https://example.org/{self.entity}/{self.project}"))
    assert main(["report", "--wandb_view", "team/sums"]) == 0
    assert capsys.readouterr().out == "https://example.org/team/sums\n"
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("team", "sums", "vexact report")
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections[: len(SECTIONS)]] == list(SECTIONS)
    expected = present_panels(METRICS)
    for section in sections[: len(SECTIONS)]:
        panels = [panel["config"] for panel in section["panels"]]
        assert [panel["chartTitle"] for panel in panels] == [panel.title for panel in SECTIONS[section["name"]]]
        assert {panel["xAxis"] for panel in panels} == {"training/global_step"}
        shown = {
            panel["chartTitle"]: {
                name
                for name in METRICS
                if name in panel.get("metrics", ()) or re.search(panel.get("metricRegex") or "^$", name)
            }
            for panel in panels
        }
        found = {title: names for title, names in shown.items() if names}
        assert found == {title: set(names) for title, names in expected[section["name"]].items()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--wandb_view", "sums"], "write ENTITY/PROJECT"),
        (["--wandb_view", "a/b/c"], "write ENTITY/PROJECT"),
        (["--wandb_view", "a/b", "runs/first"], "takes no runs"),
        ([], "give the directory of a run"),
    ],
)
def test_wrong_usage_is_said(capsys, arguments, said):
    assert main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_work_is_one_message(monkeypatch, capsys):
    def refuse(view):
        raise OSError("permission\ndenied")

    monkeypatch.setattr(internal, "upsert_view2", refuse)
    monkeypatch.setenv("WANDB_BASE_URL", " ")  # which W&B would stop at
    assert main(["report", "--wandb_view", "team/sums"]) == 2
    said = capsys.readouterr().err
    assert "W&B does not take the view of team/sums: OSError: permission denied" in said
    assert "Traceback" not in said
    assert "WANDB_BASE_URL" not in os.environ
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["report", "--wandb_view", "team/sums"]) == 2
    assert "pip install 'vexact[wandb]'" in capsys.readouterr().err
