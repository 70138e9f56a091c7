"""The warp-specialised backward of sm_90: what it computes in every launch configuration, what it compiles to and, on a
GPU, its bits, which are those of the Triton kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from attention_inputs import Batch, make_batch, relative_error, same_bits
from gluon_emulator import Barrier, EmulatedKernel, Machine, Memory, registers
from hopper_inputs import compiles, on_a_hopper, with_nan_behind
from torch import Tensor

from vexact.ops.attention.reference import attention_reference
from vexact.ops.kernels.attention import packed_backward, packed_forward
from vexact.ops.kernels.attention.hopper.backward import host
from vexact.ops.kernels.attention.hopper.backward.host import KEYS, QUERIES, Walk
from vexact.ops.kernels.attention.launch import LOG2E, WARP_SPECIALISED, exponent_scale, form

_SCRIPT = Path(__file__).with_name("hopper_backward_compile.py")
_SHARED_LIMIT = 227 * 1024  # bytes one block may use
# Two sums fill the registers, so some of what the diagonal's mask and the loads of ragged ends need is put aside.
_SPILLS = {"queries 128": 100, "keys 64": 100, "keys 128": 2400, "keys 192": 1200}

EDGES = [300, 64, 1, 0, 65, 127]
LENGTHS = {
    "tile edges": (EDGES, EDGES),
    "more keys": ([300, 64, 1, 5], [400, 100, 500, 5]),
    "fewer keys": ([300, 64, 5, 130], [200, 10, 0, 128]),
    "blocks": ([128, 256, 129], [128, 256, 129]),
}
GPU_LENGTHS = LENGTHS | {
    "tile edges": ([*EDGES, 700, 128, 63, 129, 191, 193],) * 2,
    "long": ([5000, 777, 2047, 2048, 2049, 2176, 4097],) * 2,
    "many short": ([length % 61 for length in range(600)],) * 2,
}


def test_every_head_has_a_launch_configuration():
    heads = {(dim, value_dim) for _, dim, value_dim in WARP_SPECIALISED["backward"]}
    assert heads == set(QUERIES) == set(KEYS)


@compiles
def test_compile_for_sm_90_without_serialised_products(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(_SCRIPT.parents[4])}
    run = subprocess.run([sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    binaries = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(binaries) == 2 * len(WARP_SPECIALISED["backward"])
    for binary in binaries:
        assert binary["shared"] <= _SHARED_LIMIT, binary
        assert binary["wgmma"] > 0, binary
        assert binary["spilled"] <= _SPILLS.get(binary["name"], 0), binary
        assert not binary["serialised"], binary
        assert not binary["specialised"], binary


def emulated(batch: Batch, causal: bool, walks: tuple[Walk, Walk] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """(gradients of the emulated kernels, of the reference) with rows of no sequence, all of them NaN, behind."""
    leaves = [rows.double().requires_grad_() for rows in (batch.q, batch.k, batch.v)]
    out, lse = attention_reference(*leaves, batch.cu_q, batch.cu_k, batch.scale, causal)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(batch.q.dtype)
    expected = torch.autograd.grad(out, leaves, dout.double())
    lse2 = torch.where(lse.isinf(), float("inf"), lse.detach() * LOG2E).float()
    delta = (out.detach() * dout).sum(-1).float()
    statistics = [with_nan_behind(rows).T.contiguous() for rows in (delta, lse2)]
    inputs = [with_nan_behind(rows) for rows in (dout, batch.q, batch.k, batch.v)]
    gradients = [torch.full_like(rows, float("nan")) for rows in inputs[1:]]
    with configured(batch, walks):
        lengths, scales = (batch.cu_q, batch.cu_k), (exponent_scale(batch.scale), batch.scale)
        given = host.Inputs(form(*inputs[1:]), *inputs, *statistics, *lengths, *scales, causal)
        assert host.launch_backward(given, *gradients)
    return gradients, list(expected)


@contextmanager
def configured(batch: Batch, walks: tuple[Walk, Walk] | None) -> Iterator[None]:
    heads = batch.q.shape[-1], batch.v.shape[-1]
    queries, keys = walks or (QUERIES[heads], KEYS[heads])
    with patch.dict(QUERIES, {heads: queries}), patch.dict(KEYS, {heads: keys}):
        yield


@pytest.fixture
def emulator(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the emulator takes CPU tensors; a GPU has the real kernels")
    for kernel in ("queries_kernel", "keys_kernel"):
        monkeypatch.setattr(host, kernel, EmulatedKernel(getattr(host, kernel)))


def assert_close(gradients: list[Tensor], expected: list[Tensor]) -> None:
    for gradient, reference in zip(gradients, expected, strict=True):
        rows = reference.shape[0]
        assert relative_error(gradient[:rows], reference) < 5e-3
        assert not gradient[rows:].any()


@pytest.mark.parametrize(("name", "dims", "causal"), [
    ("tile edges", (128, 128), True), ("more keys", (128, 128), True), ("fewer keys", (128, 128), True),
    ("tile edges", (64, 64), True), ("tile edges", (64, 64), False), ("more keys", (192, 128), True),
    ("fewer keys", (192, 128), False),
])  # fmt: skip
@pytest.mark.usefixtures("emulator")
def test_emulated_backward_is_the_gradient(name, dims, causal):
    assert_close(*emulated(make_batch(*LENGTHS[name], heads=(4, 2), dims=dims), causal))


@pytest.mark.parametrize(("block", "stages", "ahead"), [(32, 4, True), (64, 3, True), (64, 3, False), (128, 3, True)])
@pytest.mark.usefixtures("emulator")
def test_every_walk_gives_the_gradient(block, stages, ahead):
    walk = Walk(block, stages, ahead)
    assert_close(*emulated(make_batch(*LENGTHS["tile edges"], heads=(2, 1), dims=(64, 64)), True, (walk, walk)))


@pytest.mark.usefixtures("emulator")
def test_a_ring_that_its_own_consumer_would_wait_for_is_refused():
    walks = QUERIES[64, 64], Walk(32, 3)
    with pytest.raises(AssertionError):
        emulated(make_batch([100], [100], heads=(1, 1), dims=(64, 64)), True, walks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator takes CPU tensors; a GPU has the real kernels")
def test_the_emulator_shows_a_block_that_was_not_waited_for(monkeypatch):
    for kernel in ("queries_kernel", "keys_kernel"):
        monkeypatch.setattr(host, kernel, EmulatedKernel(getattr(host, kernel), hasty=True))
    gradients, _ = emulated(make_batch([128], [128], heads=(1, 1), dims=(64, 64)), True)
    assert all(gradient[:128].isnan().any() for gradient in gradients)


def test_the_emulator_shows_registers_that_are_let_go_and_a_copy_before_the_fence():
    machine = Machine(0, 1, 0, False)
    place, ones = Memory(torch.ones(4, 4)), registers(torch.ones(4, 4))
    both = [machine.multiply(ones, place, registers(torch.zeros(4, 4)), is_async=True) for _ in range(2)]
    assert torch.equal(machine.wait_products(1, [both[0], ones])[0], torch.full((4, 4), 4.0))
    with pytest.raises(RuntimeError, match="let go"):
        machine.wait_products(0, [both[1]])
    place.store(torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="before the fence"):
        machine.copy(SimpleNamespace(block_shape=[4, 4]), [0, 0], Barrier(), place)


def gradients_of(batch: Batch, causal: bool, specialised: bool) -> tuple[Tensor, ...]:
    expected = packed_forward(*batch.arguments, causal, specialised=False)
    generator = torch.Generator(batch.q.device).manual_seed(2)
    dout = torch.randn(expected[0].shape, generator=generator, device=batch.q.device).to(batch.q.dtype)
    arguments = (dout, batch.q, batch.k, batch.v, *expected, *batch.arguments[3:], causal)
    return packed_backward(*arguments, specialised=specialised)


GPU_HEADS = [
    ((128, 128), (4, 2), torch.bfloat16), ((64, 64), (9, 3), torch.bfloat16), ((192, 128), (4, 4), torch.bfloat16),
    ((128, 128), (2, 2), torch.float16),
]  # fmt: skip


@on_a_hopper
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", GPU_LENGTHS)
@pytest.mark.parametrize(("dims", "heads", "dtype"), GPU_HEADS)
def test_bits_are_those_of_the_triton_kernels(dims, heads, dtype, name, causal):
    batch = make_batch(*GPU_LENGTHS[name], heads=heads, dims=dims, dtype=dtype)
    expected = gradients_of(batch, causal, False)
    for _ in range(3):
        assert same_bits(gradients_of(batch, causal, True), expected)


@on_a_hopper
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
def test_rows_of_no_sequence_have_no_gradient_and_do_not_reach_others(dims):
    batch = make_batch([333, 95], [333, 95], heads=(4, 4), dims=dims)
    expected = gradients_of(batch, True, False)
    q, k, v = (with_nan_behind(rows) for rows in (batch.q, batch.k, batch.v))
    for gradient, own in zip(gradients_of(Batch(q, k, v, [333, 95], [333, 95]), True, True), expected, strict=True):
        assert same_bits((gradient[:428],), (own,))
        assert not gradient[428:].any()


@on_a_hopper
def test_heads_with_gaps_are_read_in_place():
    batch = make_batch([900, 77, 300], [900, 77, 300], heads=(4, 2), dims=(128, 128))
    expected = gradients_of(batch, True, False)
    views = torch.cat([batch.q, batch.k, batch.v], 1).split([4, 2, 2], 1)
    assert same_bits(gradients_of(Batch(*views, batch.q_lens, batch.k_lens), True, True), expected)
