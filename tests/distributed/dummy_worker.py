"""A worker that does on command what real ones do by mistake."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from vexact.distributed import RankInfo


class Dummy:
    memory_advice: ClassVar = {"fail": "lower the size of the dummy"}

    def __init__(self, info: RankInfo) -> None:
        self.info = info

    def who(self) -> RankInfo:
        return self.info

    def folder(self) -> str:
        return os.getcwd()

    def add(self, array: np.ndarray, more: float = 0.0) -> np.ndarray:
        array += self.info.rank  # an argument is the worker's own
        return array + more

    def total(self, value: float) -> float:
        tensor = torch.tensor([value], device=self.info.device)
        dist.all_reduce(tensor)
        return tensor.item()

    def wait_for(self, file: str) -> None:
        while not os.path.exists(file):
            time.sleep(0.01)

    def say(self, text: str) -> None:
        sys.stdout.write(f"{text} {self.info.rank}\n")
        sys.stderr.write("the same everywhere\n")

    def fail(self, rank: int, kind: str) -> Any:
        """The rank fails; the others wait for it in a collective."""
        if self.info.rank == rank:
            if kind == "value":
                raise ValueError("data.train_batch_size=3 is wrong")
            if kind == "bug":
                return {}["absent"]
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. " + "More. " * 60)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "peer":
                raise RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:3")
        return self.total(1.0)


def make(info: RankInfo, broken: bool = False) -> Dummy:
    if broken and info.rank == 1:
        raise ValueError("model.path=nowhere does not exist")
    return Dummy(info)
