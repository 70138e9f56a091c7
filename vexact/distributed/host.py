"""One worker in its own process: runs what the driver calls and makes records of what goes wrong."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vexact
from vexact import env
from vexact.distributed.failure import Failure, failure_of
from vexact.distributed.layout import RankInfo
from vexact.distributed.process_group import join_process_group, leave_process_group, reach_store, serve_store
from vexact.distributed.versions import Versions, versions

__hides_frames__ = True  # of this file, in the traceback of a worker's error
_PACKAGE = Path(vexact.__file__).parent


@dataclass(frozen=True, slots=True)
class Call:
    """One call on its way to one rank."""

    method: str
    stage: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    on_host: bool = False  # of the worker's host, not of the worker


class WorkerHost:
    """Holds one worker. All but ``where`` is called from one thread.

    Args:
        store: the rendezvous of the process group, where the launcher has one.
    """

    def __init__(self, info: RankInfo, store: Any = None) -> None:
        self.info = info
        self._store = store
        self._worker: Any = None
        self._thread = 0
        self._stage = ""

    def run(self, call: Call | bytes) -> tuple[Any, Failure | None]:
        """Makes a call; (its result, None) or (None, what happened). Of a pickled call the result is pickled, too."""
        self._thread, self._stage = threading.get_ident(), "reading a call"
        travels, method = isinstance(call, bytes), ""
        try:
            if self.info.device != "cpu":
                sys.modules["torch"].cuda.set_device(self.info.device)
            known: Call = pickle.loads(call) if isinstance(call, bytes) else call
            self._stage, method = known.stage, known.method
            value = getattr(self if known.on_host else self._worker, method)(*known.args, **known.kwargs)
            return (pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL) if travels else value), None
        except BaseException as error:
            advice = getattr(self._worker, "memory_advice", {}).get(method)
            return None, failure_of(error, self.info.rank, advice, travels)
        finally:
            self._stage = ""

    def serve_store(self, address: str, timeout_s: float) -> int:
        """Opens the rendezvous of the process group on a free port of this machine; for rank 0."""
        self._store, port = serve_store(address, timeout_s)
        return port

    def join(self, address: str, port: int, start_timeout_s: float, timeout_s: float) -> None:
        """Joins the process group, whose collectives then take at most about ``timeout_s``."""
        if self._store is None:
            self._store = reach_store(address, port, start_timeout_s)
        join_process_group(self.info, self._store, timeout_s)

    def make(self, factory: Callable[[RankInfo], Any]) -> None:
        """Makes the worker."""
        self._worker = factory(self.info)

    def close(self) -> None:
        """Closes the worker and leaves the process group; all ranks call it together."""
        if hasattr(self._worker, "close"):
            self._worker.close()
        self._worker = None
        leave_process_group()

    def where(self) -> str:
        """What the worker is doing, for a rank that answers late: stage and line, inside this package if it can be."""
        frame = sys._current_frames().get(self._thread)
        if not self._stage or frame is None:
            return "idle"
        frames = traceback.extract_stack(frame)
        inner = frames[-1]
        text = f"{self._stage}, in {inner.name}() ({Path(inner.filename).name}:{inner.lineno})"
        ours = [f for f in frames if Path(f.filename).is_relative_to(_PACKAGE) and f.filename != __file__]
        if ours and ours[-1] is not inner:
            place = Path(ours[-1].filename).relative_to(_PACKAGE.parent)
            text += f", called from {place}:{ours[-1].lineno}"
        return text


@dataclass(frozen=True, slots=True)
class Hello:
    """What a process says of itself before it is a rank."""

    host: str
    pid: int
    num_gpus: int  # that it sees; 0 where none are wanted
    versions: Versions


def hello(device: str) -> Hello:
    """Who this process is."""
    num_gpus = 0
    if device == "cuda":
        import torch

        num_gpus = torch.cuda.device_count()
    return Hello(socket.gethostname(), os.getpid(), num_gpus, versions())


def prepare_process(level: int, rank: int) -> None:
    """What a command does first in its process: environment and logging, as in the driver.

    Messages below a warning come from rank 0 alone, unless the driver asks for more than usual: the ranks do the same.
    """
    env.set_process_defaults()
    logging.basicConfig(format="%(message)s", force=True)
    quiet = rank > 0 and level >= logging.INFO
    logging.getLogger("vexact").setLevel(max(level, logging.WARNING) if quiet else level)
