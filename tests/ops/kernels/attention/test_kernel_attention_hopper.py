"""The warp-specialised kernels of sm_90: what they compile to and compute, when they are chosen and, on a GPU, their
bits, which are those of the Triton kernels."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_inputs import Batch, cumulative, make_batch, relative_error, same_bits
from gluon_emulator import EmulatedKernel
from torch import Tensor

from vexact.ops.attention.reference import attention_reference
from vexact.ops.kernels.attention import packed_backward, packed_forward
from vexact.ops.kernels.attention.hopper import host
from vexact.ops.kernels.attention.launch import (
    KEY_BLOCKS,
    LOG2E,
    PROVEN,
    HeadShape,
    chunk_to_merge,
    exponent_scale,
    head_shape,
    warp_specialised,
)

_SCRIPT = Path(__file__).with_name("hopper_compile.py")
_SHARED_LIMIT = 227 * 1024  # bytes one block may use
# The kernel of dK and dV keeps two sums of 64 x 128 in registers, and puts some numbers of its walk aside.
_SPILLS = {"keys 128": 160}

EDGES = [300, 64, 1, 0, 65, 127]
LENGTHS = {
    "tile edges": (EDGES, EDGES),
    "chunk edges": ([2049, 130],) * 2,
    "more keys": ([300, 64, 1, 5], [400, 100, 2300, 5]),
    "fewer keys": ([300, 64, 5, 130], [200, 10, 0, 128]),
}
GPU_LENGTHS = LENGTHS | {
    "tile edges": ([*EDGES, 700, 128, 63, 129, 191, 193],) * 2,
    "chunk edges": ([5000, 777, 2047, 2048, 2049, 2176, 4097],) * 2,
    "many short": ([length % 61 for length in range(600)],) * 2,
}


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def test_compile_for_sm_90_without_serialised_products(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(_SCRIPT.parents[4])}
    run = subprocess.run([sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    binaries = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(binaries) == 6
    for binary in binaries:
        assert binary["shared"] <= _SHARED_LIMIT, binary
        assert binary["wgmma"] > 0, binary
        assert binary["spilled"] <= _SPILLS.get(binary["name"], 0), binary
        assert not binary["serialised"], binary
        assert not binary["specialised"], binary


def test_other_devices_and_heads_have_the_triton_kernels() -> None:
    heads = HeadShape(16, 8, 128, 128, 2)
    assert not warp_specialised("forward", heads, torch.device("cpu"), True)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        assert warp_specialised("forward", heads, device, True) == on_hopper()
        assert not warp_specialised("forward", heads, device, False)
        assert warp_specialised("backward", heads, device) == (on_hopper() and "backward" in PROVEN)
        for dim, value_dim, element_bytes in ((128, 128, 4), (80, 80, 2), (192, 128, 2)):
            assert not warp_specialised("forward", HeadShape(16, 8, dim, value_dim, element_bytes), device, True)


def emulated_forward(batch: Batch, causal: bool) -> tuple[Tensor, Tensor]:
    shape = head_shape(batch.q, batch.k, batch.v)
    out = torch.full((batch.q.shape[0], shape.num_heads, shape.value_dim), float("nan"), dtype=batch.q.dtype)
    lse = torch.full(out.shape[:2], float("nan"))
    chunk = chunk_to_merge(KEY_BLOCKS[shape.key], max(batch.k_lens))
    assert host.launch_forward(
        batch.q, batch.k, batch.v, out, lse, batch.cu_q, batch.cu_k, exponent_scale(batch.scale), chunk, causal
    )
    return out, lse


def with_nan_behind(rows: Tensor, count: int = 200) -> Tensor:
    return torch.cat([rows, torch.full_like(rows[:1], float("nan")).expand(count, *rows.shape[1:])])


def shorter(batch: Batch) -> Batch:
    """The batch with rows of no sequence behind it, all of them NaN."""
    q, k, v = (with_nan_behind(rows) for rows in (batch.q, batch.k, batch.v))
    return Batch(q, k, v, batch.q_lens, batch.k_lens)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator takes CPU tensors; a GPU has the real kernels")
@pytest.mark.parametrize(("name", "dim", "causal"), [
    *((name, 128, True) for name in LENGTHS), ("tile edges", 64, True), ("chunk edges", 64, True),
    ("tile edges", 128, False), ("more keys", 64, False),
])  # fmt: skip
def test_emulated_forward_is_attention(name, dim, causal, monkeypatch):
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel))
    batch = make_batch(*LENGTHS[name], heads=(2, 1), dims=(dim, dim))
    out, lse = emulated_forward(shorter(batch), causal)
    expected, expected_lse = attention_reference(batch.q, batch.k, batch.v, batch.cu_q, batch.cu_k, batch.scale, causal)
    rows = batch.q.shape[0]
    assert relative_error(out[:rows], expected) < 4e-3
    torch.testing.assert_close(lse[:rows].double(), expected_lse, rtol=0, atol=4e-3)
    assert not out[rows:].any()
    assert torch.all(lse[rows:] == float("-inf"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator takes CPU tensors; a GPU has the real kernels")
@pytest.mark.parametrize(("name", "dim", "causal"), [
    ("tile edges", 128, True), ("more keys", 128, True), ("fewer keys", 128, True), ("tile edges", 64, True),
    ("tile edges", 64, False),
])  # fmt: skip
def test_emulated_backward_is_the_gradient(name, dim, causal, monkeypatch):
    for kernel in ("queries_kernel", "keys_kernel"):
        monkeypatch.setattr(host, kernel, EmulatedKernel(getattr(host, kernel)))
    lengths = ([300, 64, 1, 5], [400, 100, 500, 5]) if name == "more keys" else LENGTHS[name]
    batch = make_batch(*lengths, heads=(2, 1), dims=(dim, dim))
    leaves = [rows.double().requires_grad_() for rows in (batch.q, batch.k, batch.v)]
    out, lse = attention_reference(*leaves, batch.cu_q, batch.cu_k, batch.scale, causal)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(batch.q.dtype)
    expected = torch.autograd.grad(out, leaves, dout.double())
    lse2 = torch.where(lse.isinf(), float("inf"), lse.detach() * LOG2E).float()
    delta = (out.detach() * dout).sum(-1).float()
    statistics = [with_nan_behind(rows).T.contiguous() for rows in (delta, lse2)]
    padded = shorter(batch)
    gradients = [torch.full_like(rows, float("nan")) for rows in (padded.q, padded.k, padded.v)]
    assert host.launch_backward(
        with_nan_behind(dout), padded.q, padded.k, padded.v, *statistics, *gradients, batch.cu_q, batch.cu_k,
        exponent_scale(batch.scale), batch.scale, causal,
    )  # fmt: skip
    for gradient, reference in zip(gradients, expected, strict=True):
        rows = reference.shape[0]
        assert relative_error(gradient[:rows], reference) < 5e-3
        assert not gradient[rows:].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator takes CPU tensors; a GPU has the real kernels")
def test_the_emulator_shows_a_tile_that_was_not_waited_for(monkeypatch):
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel, hasty=True))
    out, _ = emulated_forward(make_batch([128], [128], heads=(1, 1), dims=(128, 128)), True)
    assert out.isnan().any()


GPU_HEADS = [(128, (4, 2), torch.bfloat16), (64, (9, 3), torch.bfloat16), (128, (2, 2), torch.float16)]


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", GPU_LENGTHS)
@pytest.mark.parametrize(("dim", "heads", "dtype"), GPU_HEADS)
def test_bits_are_those_of_the_triton_kernels(dim, heads, dtype, name, causal):
    batch = make_batch(*GPU_LENGTHS[name], heads=heads, dims=(dim, dim), dtype=dtype)
    expected = packed_forward(*batch.arguments, causal, specialised=False)
    for _ in range(3):
        assert same_bits(packed_forward(*batch.arguments, causal, specialised=True), expected)
    dout = torch.randn_like(expected[0])
    arguments = (dout, batch.q, batch.k, batch.v, *expected, *batch.arguments[3:], causal)
    gradients = packed_backward(*arguments, specialised=False)
    for _ in range(3):
        assert same_bits(packed_backward(*arguments, specialised=True), gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90")
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_of_no_sequence_are_cleared_and_do_not_reach_others(dim):
    batch = make_batch([333, 95], [333, 95], heads=(4, 2), dims=(dim, dim))
    expected = packed_forward(*batch.arguments, True, specialised=False)
    out, lse = packed_forward(*shorter(batch).arguments, True, specialised=True)
    assert same_bits((out[:428], lse[:428]), expected)
    assert not out[428:].any()
    assert torch.all(lse[428:] == float("-inf"))


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90")
def test_heads_with_gaps_are_read_in_place_and_a_captured_call_repeats():
    lengths = random.Random(0).choices(range(1, 900), k=12)
    batch = make_batch(lengths, lengths, heads=(4, 2), dims=(128, 128))
    expected = packed_forward(*batch.arguments, True, specialised=False)
    views = torch.cat([batch.q, batch.k, batch.v], 1).split([4, 2, 2], 1)
    cu = cumulative(lengths)
    run = (*views, cu, cu, max(lengths), max(lengths), batch.scale, True)
    assert same_bits(packed_forward(*run, specialised=True), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed_forward(*run, specialised=True)
    for _ in range(3):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        assert same_bits(captured, expected)
