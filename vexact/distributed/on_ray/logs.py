"""What workers print, on the driver's console: lines with their rank, and nothing of Ray's own."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

REPEAT_S = 10.0  # a line that another rank has said within this time is not said again


class WorkerLines:
    """Prints batches of lines as Ray delivers them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, str]] = {}

    def __call__(self, batch: dict[str, Any]) -> None:
        name = batch.get("actor_name") or ""
        if not name.startswith("rank "):
            return
        stream = sys.stderr if batch.get("is_err") else sys.stdout
        with self._lock:
            lines = [line for line in batch.get("lines", ()) if line.strip() and self._is_new(line, name)]
        if lines:
            stream.write("".join(f"[{name}] {line}\n" for line in lines))
            stream.flush()

    def _is_new(self, line: str, name: str) -> bool:
        now = time.monotonic()
        self._said = {text: said for text, said in self._said.items() if now - said[0] < REPEAT_S}
        _, first = self._said.setdefault(line, (now, name))
        return first == name


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
