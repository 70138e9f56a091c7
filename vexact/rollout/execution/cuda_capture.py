"""Capturing a computation on fixed tensors as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Compute = Callable[[], Tensor]


class CudaCapture:
    """Turns computations into graphs that share one memory pool.

    The result of a replay is valid until the next replay of any of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """A replay of ``compute``, which must not read device memory on the host; it runs once here.

        Raises:
            RuntimeError: see ``ran_out_of_memory``; or ``compute`` did what cannot be captured.
        """
        with torch.cuda.device(self._device):
            self._compile(compute)
            graph = torch.cuda.CUDAGraph()
            # only this thread: others may allocate while this one captures
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _compile(self, compute: Compute) -> None:
        """Kernels are compiled and loaded at their first launch, and loading cannot be captured."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a lack of device memory is among the causes: a capture that it interrupts may fail again as it ends."""
    while error is not None and not isinstance(error, torch.cuda.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
