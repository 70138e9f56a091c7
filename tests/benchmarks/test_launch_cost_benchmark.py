"""Host times of attention: which way the launches go while they are taken."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention import launch_cost
from vexact.ops.kernels import launches


def test_both_families_are_timed_repeated_bound_and_new(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[tuple[int, bool, bool]] = []

    def make(name: str, tokens: int) -> launch_cost.Pass:
        def run(specialised: bool | None) -> tuple[torch.Tensor, ...]:
            ways.append((tokens, bool(specialised), launches._observed()))
            return ()

        return run

    monkeypatch.setattr(launch_cost, "make", make)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    row = launch_cost.measure("forward", 512)
    kinds = "repeated", "bound", "first"
    assert set(row) == {f"{family}_{kind}_us" for family in ("triton", "specialised") for kind in kinds}
    calls = launch_cost.CALLS * launch_cost.ROUNDS
    for specialised in (False, True):
        assert ways.count((512, specialised, False)) == calls + 1
        assert ways.count((512, specialised, True)) == calls
    new = [tokens for tokens, _, _ in ways if tokens != 512]
    assert len(new) == len(set(new)) == 2 * launch_cost.NEW_LENGTHS
