"""Kernels that expose the generator inside the sampler."""

from __future__ import annotations

import rowwise  # noqa: F401  (chooses the interpreter before the kernels below are defined)
import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.sampling.draw import gumbel_from_bits
from vexact.ops.kernels.sampling.philox import philox_4x32_10


@triton.jit
def _philox_kernel(input_ptr, output_ptr, count, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    mask = row < count
    c0 = tl.load(input_ptr + row * 6, mask=mask).to(tl.uint32)
    c1 = tl.load(input_ptr + row * 6 + 1, mask=mask).to(tl.uint32)
    c2 = tl.load(input_ptr + row * 6 + 2, mask=mask).to(tl.uint32)
    c3 = tl.load(input_ptr + row * 6 + 3, mask=mask).to(tl.uint32)
    k0 = tl.load(input_ptr + row * 6 + 4, mask=mask).to(tl.uint32)
    k1 = tl.load(input_ptr + row * 6 + 5, mask=mask).to(tl.uint32)
    r0, r1, r2, r3 = philox_4x32_10(c0, c1, c2, c3, k0, k1)
    tl.store(output_ptr + row * 4, r0.to(tl.int64), mask=mask)
    tl.store(output_ptr + row * 4 + 1, r1.to(tl.int64), mask=mask)
    tl.store(output_ptr + row * 4 + 2, r2.to(tl.int64), mask=mask)
    tl.store(output_ptr + row * 4 + 3, r3.to(tl.int64), mask=mask)


@triton.jit
def _gumbel_kernel(bits_ptr, output_ptr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    tl.store(output_ptr + row, gumbel_from_bits(tl.load(bits_ptr + row).to(tl.uint32)))


def philox(counters_and_keys: Tensor) -> Tensor:
    """(N, 6) int64 words (four of counter, two of key) -> (N, 4) int64."""
    output = torch.empty(len(counters_and_keys), 4, dtype=torch.int64, device=counters_and_keys.device)
    block = triton.next_power_of_2(len(counters_and_keys))
    _philox_kernel[(1,)](counters_and_keys, output, len(counters_and_keys), BLOCK=block)
    return output


def gumbel(bits: Tensor) -> Tensor:
    """(N,) int64 words, N a power of two -> (N,) fp32 noise."""
    output = torch.empty(len(bits), dtype=torch.float32, device=bits.device)
    _gumbel_kernel[(1,)](bits, output, BLOCK=len(bits))
    return output
