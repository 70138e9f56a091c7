"""One worker in the driver's own process: calls are calls, nothing is pickled."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vexact.distributed.group import Pending, WorkerGroup
from vexact.distributed.layout import RankInfo


@dataclass(frozen=True, slots=True)
class _Done:
    value: Any

    def done(self) -> bool:
        return True

    def result(self) -> list[Any]:
        return [self.value]


class LocalGroup(WorkerGroup):
    """Runs a call when it is started; what it raises passes through as it is, and the worker lives on."""

    def __init__(self, factory: Callable[[RankInfo], Any], device: str) -> None:
        info = RankInfo(0, 1, 0, 0, socket.gethostname(), os.getpid(), "cpu" if device == "cpu" else "cuda:0")
        self.infos = (info,)
        self._worker = factory(info)

    def start_each(
        self,
        method: str,
        args_per_rank: Sequence[tuple[Any, ...]],
        *,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        stage: str = "",
    ) -> Pending:
        assert len(args_per_rank) == len(self._ranks(ranks)) == 1
        return _Done(getattr(self._worker, method)(*args_per_rank[0]))

    def start(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
        stage: str = "",
        **kwargs: Any,
    ) -> Pending:
        assert self._ranks(ranks) == (0,)
        return _Done(getattr(self._worker, method)(*args, **kwargs))

    def tell_lost(self) -> None:
        """Its only process is this one."""

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if hasattr(worker, "close"):
            worker.close()
