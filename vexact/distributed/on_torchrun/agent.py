"""The end of torchrun's agent is the end of the ranks that it started: else nobody would be left to stop them."""

from __future__ import annotations

import os
import signal
import threading
import time

from vexact.env import TorchrunRank

POLL_S = 0.5
PATIENCE_S = 2.0  # of the other ranks: if rank 0 has lost its agent, too, it ends them, and says how to go on


def watch_agent(launched: TorchrunRank) -> None:
    """Ends this process soon after the one that started it has gone, where that was torchrun: rank 0 by SIGTERM."""
    if launched.has_agent:
        arguments = (os.getppid(), launched.rank)
        threading.Thread(target=_watch, args=arguments, name="agent", daemon=True).start()


def _watch(agent: int, rank: int) -> None:
    while os.getppid() == agent:
        time.sleep(POLL_S)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        time.sleep(PATIENCE_S)
        os._exit(1)
