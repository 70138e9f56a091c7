"""The kernels of the mixture of experts compile for three generations of GPU, and one binary serves every batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S

_SCRIPT = Path(__file__).with_name("moe_compile.py")
_SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may use
# At most: weighted, and the sum of gradients; few chunks, and many
_VARIANTS = {"combine_kernel": 2, "place_kernel": 2}
_NEVER_CONTRACTED = {"route_kernel", "route_backward_kernel", "combine_backward_kernel", "few_gated_kernel"}


@pytest.mark.parametrize("arch", sorted(_SHARED_LIMIT))
def test_kernels_compile_within_shared_memory_and_serve_every_batch(arch: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join((str(_SCRIPT.parents[4]), str(_SCRIPT.parents[1] / "linear")))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, str(_SCRIPT), str(arch)], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    kernels = {record["kernel"] for record in records}
    assert kernels >= {"rank_kernel", "scan_chunks_kernel", "place_kernel"} | _NEVER_CONTRACTED
    assert kernels >= {"few_gated_kernel", "few_down_kernel"}
    assert kernels >= {"combine_kernel", "grouped_pointer_kernel", "grouped_grad_weight_kernel"}
    assert ("grouped_tma_kernel" in kernels) == (arch >= 90)
    for record in records:
        assert record["shared"] <= _SHARED_LIMIT[arch], record
        assert record["binaries"] <= _VARIANTS.get(record["kernel"], 1), record
        assert not record["atomics"], record
        assert not (record["contracted"] and record["kernel"] in _NEVER_CONTRACTED), record
        if record["kernel"] in ("combine_kernel", "few_down_kernel"):
            assert record["contracted"], record  # by name
        if arch == 90 and "block_m=128" in record["name"]:
            assert record["wgmma"], record
