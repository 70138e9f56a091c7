"""A small soak: the same as ``benchmarks/rollout/soak.py`` with fewer requests."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.rollout import soak
from vexact.rollout import Engine
from vexact.types import Sample


def test_nothing_leaks_gets_lost_or_differs() -> None:
    report = soak.soak(soak.tiny_engine, 200)
    assert report["problems"] == []
    assert report["tokens_compared"] > 2000
    assert report["preemptions"] > 0
    assert report["refused_and_sent_again"] > 0
    assert all(report["ways"][way] > 3 for way in soak.WAYS)


def test_one_flipped_bit_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    direct = soak.direct

    def flipped(engine: Engine, asks: list[soak.Ask]) -> dict[str, list[Sample]]:
        expected = direct(engine, asks)
        for samples in expected.values():
            samples[0].logprobs.view(np.int32)[0] ^= 1
        return expected

    monkeypatch.setattr(soak, "direct", flipped)
    assert soak.soak(soak.tiny_engine, 10, concurrency=4)["different"] > 0
