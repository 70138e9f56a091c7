"""What workers print, on the driver's console: lines with their rank, and nothing of Ray's own."""

from __future__ import annotations

import sys
from typing import Any

from vexact.distributed.lines import Lines


class WorkerLines:
    """Prints batches of lines as Ray delivers them."""

    def __init__(self) -> None:
        self._lines = Lines()

    def __call__(self, batch: dict[str, Any]) -> None:
        name = batch.get("actor_name") or ""
        if not name.startswith("rank "):
            return
        stream = sys.stderr if batch.get("is_err") else sys.stdout
        lines = [line for line in batch.get("lines", ()) if line.strip() and self._lines.is_new(line, name)]
        if lines:
            stream.write("".join(f"[{name}] {line}\n" for line in lines))
            stream.flush()


def take_over() -> None:
    """Replaces Ray's printer of this process by ours; where this Ray has none to replace, its own goes on.

    Its own also says, in half a page, that a worker died, which is for us to say; the switch is that of its debugger.
    """
    try:
        from ray._private import worker
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    except ImportError:
        return
    worker._worker_logs_enabled = False
    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("ray_print_logs", WorkerLines())
