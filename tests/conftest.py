"""Deselects tests whose hardware is absent (a skip always means a gap); without a GPU, picks Triton's interpreter."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, however slow the machine is.
settings.register_profile("anywhere", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anywhere")

# Triton decides on its first import, whoever imports it; this file is read before any test module.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts tests in the background has them ignore Ctrl-C, and every process under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GPUS_NEEDED = {"gpu": 1, "multi_gpu": 2}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if find_browser() is None:
        without = [item for item in items if item.get_closest_marker("browser")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]
    needs = {
        item: max((GPUS_NEEDED[mark.name] for mark in item.iter_markers() if mark.name in GPUS_NEEDED), default=0)
        for item in items
    }
    if not any(needs.values()):
        return
    import torch

    available = torch.cuda.device_count()
    absent = [item for item in items if needs[item] > available]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if needs[item] <= available]


@pytest.fixture(scope="session")
def browser() -> str:
    """The command of a headless Chromium, for tests marked ``browser``."""
    found = find_browser()
    assert found is not None, "tests that ask for a browser are marked so"
    return found
