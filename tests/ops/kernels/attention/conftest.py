"""Kernels that take seconds to compile are compiled side by side."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from hopper_inputs import on_hopper, run_test


@pytest.fixture(scope="module")
def compiled_in_parallel(request: pytest.FixtureRequest) -> None:
    """Each GPU test of the file that was asked for has run once in a process of a pool, whatever came of it, for what
    it compiles: a kernel takes seconds, and a file needs dozens."""
    items = [item for item in request.session.items if item.path == request.path and item.get_closest_marker("gpu")]
    jobs = [job_of(item) for item in items if isinstance(item, pytest.Function)]
    if on_hopper() and len(jobs) > 2 and "PYTEST_XDIST_WORKER" not in os.environ:
        with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1, 16), mp_context=get_context("spawn")) as pool:
            for running in [pool.submit(run_test, *job) for job in jobs]:
                running.exception()


def job_of(test: pytest.Function) -> tuple[str, str, dict[str, Any]]:
    """Module, function and parameters."""
    return test.module.__name__, test.originalname, test.callspec.params if hasattr(test, "callspec") else {}
