"""The end of torchrun's agent is the end of the ranks that it started: else nobody would be left to stop them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from vexact.env import TorchrunRank

POLL_S = 1.0
PATIENCE_S = 4.0  # of the other ranks: if rank 0 has lost its agent, too, it ends them, and says how to go on


def watch_agent(launched: TorchrunRank, end: Callable[[], None]) -> None:
    """Calls ``end`` in another thread once the process that started this one has gone; where torchrun did."""
    if launched.has_agent:
        patience = PATIENCE_S if launched.rank else 0.0
        threading.Thread(target=_watch, args=(os.getppid(), patience, end), name="agent", daemon=True).start()


def _watch(agent: int, patience_s: float, end: Callable[[], None]) -> None:
    while os.getppid() == agent:
        time.sleep(POLL_S)
    time.sleep(patience_s)
    end()
