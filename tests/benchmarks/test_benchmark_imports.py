"""Every benchmark finds what it imports; most run on a GPU only, where a name that is gone would come out late."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("*.py")]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    import_module(name)
