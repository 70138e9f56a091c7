"""The process of one worker, as Ray runs it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from vexact.distributed.failure import Failure
from vexact.distributed.host import Hello, WorkerHost, hello, prepare_process
from vexact.distributed.layout import RankInfo


class RayWorker:
    """All methods but ``where`` run one after another in one thread; what a worker raises comes back as a record."""

    def __init__(self, rank: int, level: int, folder: str) -> None:
        """``folder``: the driver's, from which relative paths start; a node without it keeps the one Ray gave it."""
        self._name = f"rank {rank}"
        with suppress(OSError):
            os.chdir(folder)
        prepare_process(level, rank)
        self._host: WorkerHost | None = None

    def __repr__(self) -> str:
        return self._name  # Ray marks the process's output with it

    def hello(self, device: str) -> tuple[Hello, str, int]:
        """(The process, the address of its node, the index that it counts the GPU under that Ray gave it)."""
        import ray

        said = hello(device)
        gpu = int(ray.get_gpu_ids()[0]) if said.num_gpus > 1 else 0
        return said, ray.util.get_node_ip_address(), gpu

    def become(self, info: RankInfo) -> None:
        """Takes its rank."""
        self._host = WorkerHost(info)

    def run(self, call: bytes) -> tuple[Any, Failure | None]:
        assert self._host is not None
        return self._host.run(call)

    def close(self) -> None:
        assert self._host is not None
        self._host.close()

    def where(self) -> str:
        return "start-up" if self._host is None else self._host.where()
