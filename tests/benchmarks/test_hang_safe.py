"""A benchmark goes on after a job that raised, hung or killed its process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.shared.hang_safe import Worker


def make() -> Callable[[str], dict[str, Any]]:
    answered: list[str] = []

    def answer(job: str) -> dict[str, Any]:
        answered.append(job)
        if job == "hang":
            time.sleep(999)
        if job == "die":
            os._exit(3)
        if job == "raise":
            raise ValueError("the job is bad")
        return {"answered": len(answered)}

    return answer


def test_a_worker_answers_every_job_and_starts_anew_after_a_bad_one():
    worker = Worker(make, limit_s=3.0)
    jobs = ("well", "well", "hang", "well", "die", "well", "raise", "well", "well")
    found = [worker.ask(job) for job in jobs]
    process = worker.process
    worker.stop()
    assert not process.is_alive()
    assert [answer.get("answered") for answer in found] == [1, 2, None, 1, None, 1, None, 1, 2]
    errors = [answer["error"] for answer in found if "error" in answer]
    assert errors == ["no answer in 3 s: it hangs", "its process died", "ValueError: the job is bad"]
