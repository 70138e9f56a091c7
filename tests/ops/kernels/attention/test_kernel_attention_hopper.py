"""The warp-specialised forward of sm_90: what it compiles to and computes, and when such kernels are chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_inputs import Batch, make_batch, make_pages, relative_error
from gluon_emulator import EmulatedKernel
from hopper_inputs import LATENT, LENGTHS, WIDE, compiles, on_hopper, shorter, with_nan_behind
from torch import Tensor

from vexact.ops.attention.reference import attention_reference
from vexact.ops.kernels.attention import launch, paged, paged_forward
from vexact.ops.kernels.attention.batch import Batch as Sizes
from vexact.ops.kernels.attention.hopper import host
from vexact.ops.kernels.attention.launch import (
    KEY_BLOCKS,
    PROVEN,
    HeadShape,
    chunk_to_merge,
    exponent_scale,
    form,
    head_shape,
    warp_specialised,
)

_SCRIPT = Path(__file__).with_name("hopper_compile.py")
_SHARED_LIMIT = 227 * 1024  # bytes one block may use
# The widest sums take 128 of the 224 registers of a consumer, which puts some numbers of its walk aside.
_SPILLS = {"forward 192 pages 16": 64, "forward 256": 160}
_SPILLS |= {"forward 256 pages 16": 320, "forward 256 pages 16 one chunk": 320}

emulated = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the emulator takes CPU tensors; a GPU has the real kernels"
)


@compiles
def test_compile_for_sm_90_without_serialised_products(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(_SCRIPT.parents[4])}
    run = subprocess.run([sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    binaries = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(binaries) == 10
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
        proven = "backward" in PROVEN and launch.triton_release() in launch.PROVEN_RELEASES
        assert warp_specialised("backward", heads, device) == (on_hopper() and proven)
        for dim, value_dim, element_bytes in ((128, 128, 4), (80, 80, 2), (256, 128, 2)):
            assert not warp_specialised("forward", HeadShape(16, 8, dim, value_dim, element_bytes), device, True)


def test_proven_kernels_take_batches_whose_tiles_are_filled_and_long(monkeypatch):
    heads, device = HeadShape(16, 8, 128, 128, 2), torch.device("cuda")
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    monkeypatch.setattr(launch, "triton_release", lambda: (3, 6))
    large, small = Sizes(16384, 8, 2048, 2048, True), Sizes(16384, 256, 64, 64, True)
    monkeypatch.setattr(launch, "PROVEN", frozenset())
    assert not any(warp_specialised(kind, heads, device, None, large) for kind in ("forward", "backward", "paged"))
    monkeypatch.setattr(launch, "PROVEN", frozenset({"forward"}))
    monkeypatch.setitem(launch.LEAST_WORK, ("forward", 128), 100.0)
    assert warp_specialised("forward", heads, device, None, large)
    assert not warp_specialised("forward", heads, device, None, small)
    assert not warp_specialised("forward", heads, device, False, large)
    assert warp_specialised("forward", heads, device, True, small)  # as benchmarks ask for it
    assert not warp_specialised("paged", heads, device, None, large)
    monkeypatch.delitem(launch.LEAST_WORK, ("forward", 128))
    assert not warp_specialised("forward", heads, device, None, large)


@pytest.mark.parametrize(
    ("version", "unasked", "asked"),
    [("3.6.0", True, True), ("3.7.1+git1", False, True), ("3.8.0", False, False), ("3.10.0", False, False)],
)
def test_a_release_with_another_gluon_has_the_triton_kernels(version, unasked, asked, monkeypatch):
    """With 3.8 the forward does not compile, with 3.9 none does; with 3.7 no GPU has compared bits."""
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    monkeypatch.setattr(launch, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(launch, "triton_release", launch.triton_release.__wrapped__)
    heads, device = HeadShape(16, 8, 128, 128, 2), torch.device("cuda")
    large = Sizes(16384, 8, 2048, 2048, True)
    for kind in ("forward", "paged", "backward"):
        assert warp_specialised(kind, heads, device, None, large) == unasked
        assert warp_specialised(kind, heads, device, True, large) == asked


def emulated_forward(batch: Batch, causal: bool) -> tuple[Tensor, Tensor]:
    shape = head_shape(batch.q, batch.k, batch.v)
    out = torch.full((batch.q.shape[0], shape.num_heads, shape.value_dim), float("nan"), dtype=batch.q.dtype)
    lse = torch.full(out.shape[:2], float("nan"))
    chunk = chunk_to_merge(KEY_BLOCKS[shape.key], max(batch.k_lens))
    rows, scale = (batch.q, batch.k, batch.v), exponent_scale(batch.scale)
    assert host.launch_forward(form(*rows), *rows, out, lse, batch.cu_q, batch.cu_k, scale, chunk, causal)
    return out, lse


def check_attention(got: tuple[Tensor, Tensor], batch: Batch, causal: bool) -> None:
    """Fails where out or lse is not the attention of a batch; rows behind it are to be clear."""
    out, lse = got
    expected, expected_lse = attention_reference(batch.q, batch.k, batch.v, batch.cu_q, batch.cu_k, batch.scale, causal)
    rows = batch.q.shape[0]
    assert relative_error(out[:rows], expected) < 4e-3
    torch.testing.assert_close(lse[:rows].double(), expected_lse, rtol=0, atol=4e-3)
    assert not out[rows:].any()
    assert torch.all(lse[rows:] == float("-inf"))


@emulated
@pytest.mark.parametrize(("name", "dims", "causal"), [
    *((name, (128, 128), True) for name in LENGTHS), ("tile edges", (64, 64), True), ("chunk edges", (64, 64), True),
    ("tile edges", (128, 128), False), ("more keys", (64, 64), False), ("tile edges", LATENT, True),
    ("chunk edges", LATENT, True), ("more keys", LATENT, False), ("tile edges", WIDE, False), ("more keys", WIDE, True),
])  # fmt: skip
def test_emulated_forward_is_attention(name, dims, causal, monkeypatch):
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel))
    batch = make_batch(*LENGTHS[name], heads=(2, 1), dims=dims)
    check_attention(emulated_forward(shorter(batch), causal), batch, causal)


def emulated_pages(batch: Batch, page_size: int, causal: bool, skip_up_to: int = 0) -> tuple[Tensor, Tensor]:
    pages = make_pages(batch, page_size)
    q = with_nan_behind(batch.q)
    shape = head_shape(batch.q, batch.k, batch.v)
    out = torch.full((q.shape[0], shape.num_heads, shape.value_dim), float("nan"), dtype=q.dtype)
    lse = torch.full(out.shape[:2], float("nan"))
    lengths = batch.cu_q, torch.tensor(batch.k_lens, dtype=torch.int32), pages.table
    chunk = chunk_to_merge(KEY_BLOCKS[shape.key], max(batch.k_lens))
    rows, scale = (q, pages.k_cache, pages.v_cache), exponent_scale(batch.scale)
    assert host.launch_paged(form(*rows), *rows, out, lse, lengths, scale, chunk, causal, skip_up_to)
    return out, lse


@emulated
@pytest.mark.parametrize(("name", "dims", "page_size", "causal"), [
    ("tile edges", (128, 128), 16, True), ("more keys", (128, 128), 16, True), ("fewer keys", (128, 128), 16, True),
    ("chunk edges", (128, 128), 64, True), ("more keys", (128, 128), 256, True), ("tile edges", (128, 128), 8, False),
    ("more keys", (128, 128), 48, True), ("more keys", (64, 64), 24, False), ("tile edges", (64, 64), 512, True),
    ("more keys", LATENT, 16, True), ("tile edges", LATENT, 128, False), ("more keys", WIDE, 32, True),
])  # fmt: skip
def test_emulated_forward_reads_pages(name, dims, page_size, causal, monkeypatch):
    """Unused slots of the pages are NaN, and entries of the table that hold no key are -1."""
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel))
    batch = make_batch(*LENGTHS[name], heads=(2, 1), dims=dims)
    check_attention(emulated_pages(batch, page_size, causal), batch, causal)


@emulated
def test_emulated_pages_leave_decoding_sequences_alone(monkeypatch):
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel))
    batch = make_batch([1, 130, 2, 3, 0, 70], [300, 400, 2, 90, 5, 70], heads=(2, 1), dims=(128, 128))
    out, lse = emulated_pages(batch, 16, True, skip_up_to=2)
    expected, expected_lse = attention_reference(batch.q, batch.k, batch.v, batch.cu_q, batch.cu_k, batch.scale, True)
    decoding = torch.tensor([True, *[False] * 130, True, True, *[False] * 73])
    assert out[: len(decoding)][decoding].isnan().all()
    assert lse[: len(decoding)][decoding].isnan().all()
    assert relative_error(out[: len(decoding)][~decoding], expected[~decoding]) < 4e-3
    torch.testing.assert_close(lse[: len(decoding)][~decoding].double(), expected_lse[~decoding], rtol=0, atol=4e-3)
    assert not out[len(decoding) :].any()


@emulated
def test_prompts_are_taken_beside_sequences_that_decode(monkeypatch):
    """Both families in one call: single rows by the Triton kernels, the others by the specialised one."""
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel))
    monkeypatch.setattr(paged, "warp_specialised", lambda kind, *_: kind == "paged")
    batch = make_batch([1, 130, 1, 70], [40, 200, 3, 70], heads=(2, 1), dims=(64, 64))
    pages = make_pages(batch, 16)
    used = torch.tensor(batch.k_lens, dtype=torch.int32)
    rows = batch.q, pages.k_cache, pages.v_cache
    got = paged_forward(*rows, batch.cu_q, used, pages.table, 130, 200, batch.scale, True)
    check_attention(got, batch, True)


@emulated
@pytest.mark.parametrize("page_size", [1, 4, 12])
def test_boxes_of_less_than_8_rows_are_left_to_the_triton_kernels(page_size):
    batch = make_batch([9], [9], heads=(1, 1), dims=(128, 128))
    pages = make_pages(batch, page_size)
    nothing = (torch.empty(0),) * 2
    lengths = (torch.empty(0, dtype=torch.int32),) * 3
    rows = batch.q, pages.k_cache, pages.v_cache
    assert not host.launch_paged(form(*rows), *rows, *nothing, lengths, 1.0, 0, True, 0)


@emulated
def test_the_emulator_shows_a_tile_that_was_not_waited_for(monkeypatch):
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel, hasty=True))
    out, _ = emulated_forward(make_batch([128], [128], heads=(1, 1), dims=(128, 128)), True)
    assert out.isnan().any()


@emulated
def test_the_emulator_shows_a_page_that_is_none(monkeypatch):
    monkeypatch.setattr(host, "forward_kernel", EmulatedKernel(host.forward_kernel))
    batch = make_batch([40], [40], heads=(1, 1), dims=(64, 64))
    pages = make_pages(batch, 16)
    pages.table[0, 2] = -1
    monkeypatch.setattr(sys.modules[__name__], "make_pages", lambda *_: pages)
    with pytest.raises(IndexError, match="a box at row -"):
        emulated_pages(batch, 16, True)
