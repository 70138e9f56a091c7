"""The report's sections and pictures as a saved view of a W&B project."""

from __future__ import annotations

import re
from typing import Any

from vexact.env import tidy_wandb
from vexact.report.panels import PARTS, SECTIONS, STAGES, Panel
from vexact.report.sinks.wandb import STEP

NAME = "vexact report"


class MissingWorkspacesError(ValueError):
    """The package that knows W&B's views is not installed."""

    def __init__(self) -> None:
        super().__init__("a W&B view needs the package wandb-workspaces: pip install 'vexact[wandb]'")


class ViewError(RuntimeError):
    """W&B cannot be reached, or does not take the view."""


def save_view(project: str) -> str:
    """Adds the view to ``ENTITY/PROJECT``; it shows all runs of the project. Returns its address.

    Raises:
        ValueError: not of that form; MissingWorkspacesError without the package wandb-workspaces.
        ViewError: W&B cannot be reached, or does not take it.
    """
    entity, _, name = project.partition("/")
    if not entity or not name or "/" in name:
        raise ValueError(f"--wandb_view {project}: write ENTITY/PROJECT, as in the address of the project's page")
    tidy_wandb()
    try:
        from wandb_workspaces.workspaces import Workspace
    except ImportError as error:
        raise MissingWorkspacesError from error
    view = Workspace(entity=entity, project=name, name=NAME, sections=_sections())
    try:
        return str(view.save().url)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ViewError(f"W&B does not take the view of {project}: {text}") from error


def _sections() -> list[Any]:
    from wandb_workspaces.workspaces import Section

    return [
        Section(name=title, panels=[_plot(panel) for panel in panels], is_open=True)
        for title, panels in SECTIONS.items()
    ]


def _plot(panel: Panel) -> Any:
    """A name with ``*`` is a pattern, which W&B looks up when it draws."""
    from wandb_workspaces.reports.v2 import LinePlot

    common: dict[str, Any] = {"title": panel.title, "x": STEP, "title_y": panel.unit}
    if panel.title == PARTS:
        return LinePlot(y=[f"timing_s/{stage}" for stage in STAGES], plot_type="stacked-area", **common)
    if any("*" in name for name in panel.names):
        return LinePlot(metric_regex="|".join(map(_pattern, panel.names)), **common)
    return LinePlot(y=list(panel.names), **common)


def _pattern(name: str) -> str:
    return f"^{'.+'.join(map(re.escape, name.split('*')))}$"
