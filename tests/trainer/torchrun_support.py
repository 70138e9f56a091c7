"""Commands under torchrun."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def torchrun(processes: int, program: Sequence[str], **variables: str) -> tuple[int, str]:
    """Runs ``program`` (a script, or -m and a module, and arguments) in so many processes; exit code and output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    done = subprocess.run(
        [*command, *program],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr
