"""The warp-specialised kernels of sm_90: what they compile to, when they are chosen, and the bits of the Triton kernels."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_inputs import make_batch, same_bits

from vexact.ops.kernels.attention import packed_forward
from vexact.ops.kernels.attention.launch import FORWARD_DESCRIBED, HeadShape, head_shape, warp_specialised

_SCRIPT = Path(__file__).with_name("hopper_compile.py")
_SHARED_LIMIT = 227 * 1024  # bytes one block may use

EDGES = [300, 64, 1, 0, 65, 700, 128, 127, 63, 129, 191, 193]
LENGTHS = {
    "tile edges": (EDGES, EDGES),
    "chunk edges": ([5000, 777, 2047, 2048, 2049, 2176, 4097],) * 2,
    "more keys": ([300, 64, 1, 5, 65, 700, 128, 127], [400, 100, 4000, 5, 300, 701, 5000, 2048]),
    "fewer keys": ([300, 64, 1, 5, 65, 700, 128, 127], [200, 10, 0, 5, 30, 600, 100, 128]),
    "many short": ([length % 61 for length in range(600)],) * 2,
}


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def test_compiles_for_sm_90_without_spills_and_serialised_products(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(_SCRIPT.parents[4])}
    run = subprocess.run([sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    binaries = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(binaries) == 4
    for binary in binaries:
        assert binary["shared"] <= _SHARED_LIMIT, binary
        assert binary["wgmma"] > 0, binary
        assert binary["spilled"] == 0, binary
        assert not binary["serialised"], binary


def test_other_devices_and_heads_have_the_triton_kernels() -> None:
    assert not warp_specialised(HeadShape(16, 8, 128, 128, 2), torch.device("cpu"))
    if torch.cuda.is_available():
        device = torch.device("cuda")
        assert warp_specialised(HeadShape(16, 8, 128, 128, 2), device) == on_hopper()
        for dim, value_dim, element_bytes in ((128, 128, 4), (80, 80, 2), (192, 128, 2)):
            assert not warp_specialised(HeadShape(16, 8, dim, value_dim, element_bytes), device)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("dim", "heads", "dtype"), [
    (128, (4, 2), torch.bfloat16), (64, (9, 3), torch.bfloat16), (128, (2, 2), torch.float16),
])  # fmt: skip
def test_bits_are_those_of_the_triton_kernel(dim, heads, dtype, name, causal):
    batch = make_batch(*LENGTHS[name], heads=heads, dims=(dim, dim), dtype=dtype)
    triton_tile = FORWARD_DESCRIBED[head_shape(batch.q, batch.k, batch.v).key]
    expected = packed_forward(*batch.arguments, causal, tile=triton_tile)
    for _ in range(3):
        assert same_bits(packed_forward(*batch.arguments, causal), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90")
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_of_no_sequence_are_cleared_and_do_not_reach_others(dim):
    batch = make_batch([333, 95], [333, 95], heads=(4, 2), dims=(dim, dim))
    expected = packed_forward(*batch.arguments, True)
    padded = [torch.cat([rows, torch.full_like(rows[:300], float("nan"))]) for rows in (batch.q, batch.k, batch.v)]
    out, lse = packed_forward(*padded, *batch.arguments[3:], True)
    assert same_bits((out[:428], lse[:428]), expected)
    assert not out[428:].any()
    assert torch.all(lse[428:] == float("-inf"))


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90")
def test_heads_with_gaps_are_read_in_place():
    batch = make_batch([700, 5, 130], [700, 5, 130], heads=(4, 2), dims=(128, 128))
    fused = torch.cat([batch.q, batch.k, batch.v], 1)
    views = fused.split([4, 2, 2], 1)
    assert same_bits(
        packed_forward(*views, *batch.arguments[3:], True), packed_forward(*batch.arguments, True)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90")
def test_a_captured_call_repeats():
    lengths = random.Random(0).choices(range(1, 900), k=12)
    batch = make_batch(lengths, lengths, heads=(4, 2), dims=(128, 128))
    expected = packed_forward(*batch.arguments, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed_forward(*batch.arguments, True)
    for _ in range(3):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        assert same_bits(captured, expected)
