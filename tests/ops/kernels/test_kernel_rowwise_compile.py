"""Every row-wise kernel compiles for three generations of GPU, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S

_SCRIPT = Path(__file__).with_name("rowwise_compile.py")
_SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may use


@pytest.mark.parametrize("arch", sorted(_SHARED_LIMIT))
def test_kernels_compile_within_shared_memory_and_without_contraction(arch: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(_SCRIPT.parents[3])}
    run = subprocess.run(
        [sys.executable, str(_SCRIPT), str(arch)], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 0, run.stderr
    binaries = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(binaries) == 38
    for binary in binaries:
        assert binary["shared"] <= _SHARED_LIMIT[arch], binary
        assert binary["cubin"] > 0
        # Only the sampler's logarithm asks for fused multiply-adds, by name: in its noise and in that of min_p.
        assert binary["contracted"] == (binary["name"] in ("sampling draw", "sampling threshold")), binary
        # A load that follows a store would wait for it.
        assert binary["loads_first"] or "rope" not in binary["name"], binary
    by_name = {binary["name"]: binary for binary in binaries}
    wide = (
        "rope bf16 16/8x128",
        "qk_norm_rope bf16 16/8x128",
        "rope_to_cache bf16 16/8x128 norm=True",
        "latent_rope bf16 16x128+64",
        "swiglu backward bf16 6144",
    )
    wide += ("rms_norm forward fused=True bf16 2048", "checksum of 2 bytes", "checksum of 4 bytes")
    wide += ("square_sums fp32 576", "square_sums fp32 2048", "square_sums bf16 2048")
    for name in wide:
        assert by_name[name]["wide_loads"], name
