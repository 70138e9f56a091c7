"""The end of torchrun's agent is the end of the ranks that it started: else nobody would be left to stop them."""

from __future__ import annotations

import os
import signal
import threading
import time

from vexact.env import TorchrunRank

POLL_S = 0.5
PATIENCE_S = 2.0  # of the other ranks: if rank 0 has lost its agent, too, it ends them, and says how to go on
_agent: int | None = None  # the process that started this one, where that was torchrun


def watch_agent(launched: TorchrunRank) -> None:
    """Ends this process soon after the one that started it has gone, where that was torchrun: rank 0 by SIGTERM."""
    global _agent
    if launched.has_agent:
        _agent = os.getppid()
        threading.Thread(target=_watch, args=(launched.rank,), name="agent", daemon=True).start()


def has_lost_agent() -> bool:
    """Whether the agent has gone: the ranks that it started are leaving then, and none of them is lost."""
    return _agent is not None and os.getppid() != _agent


def _watch(rank: int) -> None:
    while not has_lost_agent():
        time.sleep(POLL_S)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        time.sleep(PATIENCE_S)
        os._exit(1)
