"""The attention kernels compile for three generations of GPU, on a machine without one.

VEXACT_COMPILE_EVERY_SHAPE=1 compiles every dtype, head dimension and variant instead of a representative few (an hour
of CPU).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("attention_compile.py")
_SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may use


@pytest.mark.parametrize("arch", sorted(_SHARED_LIMIT))
def test_kernels_compile_within_shared_memory(arch: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(_SCRIPT.parents[4])}
    thorough = ["--every-shape"] if environment.get("VEXACT_COMPILE_EVERY_SHAPE") else []
    command = [sys.executable, str(_SCRIPT), str(arch), *thorough]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    binaries = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(binaries) >= 7
    for binary in binaries:
        assert binary["shared"] <= _SHARED_LIMIT[arch], binary
        assert binary["cubin"] > 0
        assert not binary["atomics"], binary
        assert not binary["specialised"], binary
        kind, *_ = binary["name"].split()
        if arch == 90 and re.search("16/8x128|16/16x192", binary["name"]) and kind in ("forward", "keys", "queries"):
            assert binary["wgmma"] > 0, binary
