"""Scripts that launch kernels through the installed Triton's own launchers, and print what those hand over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import PATIENCE_S

_ROOT = Path(__file__).parents[2]


def handed_over(script: Path, cache: Path) -> list[dict[str, Any]]:
    """A record for every line that ``script`` prints, in a process that compiles, with ``cache`` to itself."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = str(_ROOT), str(_ROOT / "tests" / "ops" / "kernels")
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
