"""Launches the warp-specialised kernels through the installed Triton's own launchers; see `launches_release.py`.

A script: `python hopper_release.py`, with the folder above this one on PYTHONPATH.
"""

from __future__ import annotations

from typing import Any

import torch
from launches_release import compare, install
from torch import Tensor

from vexact.ops.kernels.attention.hopper import host
from vexact.ops.kernels.attention.hopper.backward import host as backward
from vexact.ops.kernels.attention.launch import form

ROWS, SCALE, SOFTMAX_SCALE = 70, 0.25, 0.125


def without_body(kernel: Any) -> None:
    """Leave of a kernel what decides how it is launched: its parameters. The rest takes long to compile."""
    kernel._unsafe_update_src(kernel.src[: kernel.src.index('"""')] + "pass")


def zeros(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*size, dtype=dtype)


class Heads:
    """One sequence, its heads of some dimensions; keys with lengths of their own or those of the queries."""

    def __init__(self, dim: int, value_dim: int, *, chunk: int = 0, own_lengths: bool = False) -> None:
        self.rows = zeros(ROWS, 4, dim), zeros(ROWS, 2, dim), zeros(ROWS, 2, value_dim)
        self.out, self.chunk = zeros(ROWS, 4, value_dim), chunk
        lengths = torch.tensor([0, ROWS], dtype=torch.int32)
        self.lengths = lengths, lengths.clone() if own_lengths else lengths
        self.statistics = [zeros(4, ROWS, dtype=torch.float32) for _ in range(2)]
        self.gradients = [torch.zeros_like(rows) for rows in self.rows]
        self.used, self.table = torch.tensor([64], dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None]

    def forward(self) -> None:
        outputs = self.out, self.statistics[0]
        last = *self.lengths, SCALE, self.chunk, True
        assert host.launch_forward(form(*self.rows), *self.rows, *outputs, *last)

    def pages(self) -> None:
        rows = self.rows[0], *(rows[:64].unflatten(0, (4, 16)) for rows in self.rows[1:])
        lengths = self.lengths[0], self.used, self.table
        last = lengths, SCALE, self.chunk, True, 1
        assert host.launch_paged(form(*rows), *rows, self.out, self.statistics[0], *last)

    def backward(self) -> None:
        inputs = self.out, *self.rows, *self.statistics, *self.lengths
        given = backward.Inputs(form(*self.rows), *inputs, SCALE, SOFTMAX_SCALE, True)
        assert backward.launch_backward(given, *self.gradients)


def keep_own_memory() -> None:
    """What a launch allocates for itself lies at the same place in its repetition."""
    kept: dict[Any, Tensor] = {}
    new_empty = Tensor.new_empty
    Tensor.new_empty = lambda tensor, size: kept.setdefault(size, new_empty(tensor, size))  # type: ignore[method-assign]
    for module in (host, backward):
        module.new_counter = lambda device: kept.setdefault("counter", torch.zeros(1, dtype=torch.int32))


def main() -> None:
    install()
    keep_own_memory()
    for kernel in (host.forward_kernel, backward.queries_kernel, backward.keys_kernel):
        without_body(kernel)
    compare("forward", Heads(128, 128).forward)
    compare("forward, keys of other lengths", Heads(128, 128, own_lengths=True).forward)
    compare("forward, two tiles a key, chunks in memory", Heads(192, 128, chunk=2048).forward)
    compare("pages", Heads(64, 64).pages)
    compare("backward", Heads(128, 128).backward)
    compare("backward, keys of other lengths", Heads(128, 128, own_lengths=True).backward)
    compare("backward, two tiles a key", Heads(192, 128).backward)


if __name__ == "__main__":
    main()
