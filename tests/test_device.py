"""Devices that are not there are refused by name, before anything is read."""

from __future__ import annotations

import pytest
import torch

from vexact.device import resolve_device, usable_device
from vexact.rollout import Engine


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("cuda", 0, "device=cuda: PyTorch finds no GPU here; use device=cpu"),
        (torch.device("cuda", 1), 0, "device=cuda:1: PyTorch finds no GPU here"),
        ("cuda:2", 2, "device=cuda:2: PyTorch finds 2 here; the last one is cuda:1"),
        ("gpu", 2, "device=gpu is no device; name cpu, cuda or cuda:N"),
        ("", 2, "is no device"),
        ("mps", 0, "device=mps: models run on cpu and cuda only"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, count, message, monkeypatch, tmp_path) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(ValueError, match=message):
        usable_device(device)
    if device:  # an engine takes "" as none given
        with pytest.raises(ValueError, match=message):
            Engine(tmp_path, device=device)


def test_devices_that_are_there_are_taken(monkeypatch) -> None:
    gpus(monkeypatch, 2)
    assert [str(usable_device(name)) for name in ("cpu", "meta", "cuda", "cuda:1")] == ["cpu", "meta", "cuda", "cuda:1"]
    assert resolve_device("auto") == "cuda"
    gpus(monkeypatch, 0)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="use device=cpu or auto"):
        resolve_device("cuda")
