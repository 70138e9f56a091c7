"""The matrix product kernels compile for three generations of GPU, and one binary serves every batch size; a second
one is chained, for small steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S

_SCRIPT = Path(__file__).with_name("linear_compile.py")
_SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may use
_FUSED = {"matmul_states_kernel", "matmul_dlogits_kernel", "exponentials_to_dlogits_kernel"}
_EVERYWHERE = {"block_states_kernel", "merge_states_kernel"}


@pytest.mark.parametrize("arch", sorted(_SHARED_LIMIT))
def test_tiles_compile_within_shared_memory_and_serve_every_batch(arch: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(_SCRIPT.parents[4])}
    run = subprocess.run(
        [sys.executable, str(_SCRIPT), str(arch)], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 0, run.stderr
    records = {record["name"]: record for record in map(json.loads, run.stdout.splitlines())}
    tiles = {name: record for name, record in records.items() if "Tile(" in name}
    assert len(tiles) >= 2
    assert any("tma" in name for name in tiles) == (arch >= 90)
    for name, record in records.items():
        assert 0 <= record["shared"] <= _SHARED_LIMIT[arch], name
    for name, record in tiles.items():
        chained = arch >= 90 and name.startswith("forward")  # in small steps
        assert record["binaries"] == 1 + chained, name
    assert records.keys() >= _EVERYWHERE
    assert (records.keys() >= _FUSED) == (arch == 90)
    assert ("dlogits_kernel" in records) == (arch != 90)  # reads stored logits
    if arch == 90:
        assert records["matmul_states_kernel"]["binaries"] == 2  # with and without stored exponentials
        assert records["exponentials_to_dlogits_kernel"]["binaries"] == 1
