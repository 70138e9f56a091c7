"""Weights that are no numbers, or none in the type that computes, are named before anything runs."""

from __future__ import annotations

import pytest
import torch
from checkpoint_support import WEIGHTS, edit_weights, split, write
from safetensors.torch import load_file

from vexact.models import load_model
from vexact.models.checkpoint.values import all_finite
from vexact.rollout import Engine

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def _plant(path, name, value, count=1, dtype=None):
    tensor = load_file(path / WEIGHTS)[name].clone()
    tensor.view(-1)[-count:] = value
    edit_weights(path / WEIGHTS, **{name: tensor if dtype is None else tensor.to(dtype)})
    return list(torch.tensor(tensor.shape) - 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(tmp_path, name, value, stored):
    write(tmp_path)
    _plant(tmp_path, name, value, count=2, dtype=stored)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: {name} has 2 of \d+ values that are not finite \(the first"):
            load_model(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    ("value", "dtype", "fix"),
    [
        (70000.0, torch.float16, "bfloat16 or float32"),
        (-1e30, torch.float16, "bfloat16 or float32"),
        (65520.0, torch.float16, "bfloat16 or float32"),
        (3.4e38, torch.bfloat16, "float32"),
        (-3.4e38, torch.bfloat16, "float32"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_values_beyond_the_compute_type(tmp_path, value, dtype, fix, name):
    write(tmp_path)
    last = [int(i) for i in _plant(tmp_path, name, value)]
    load_model(tmp_path)
    short = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"{name} has 1 of \d+ values beyond {short}, .*; use dtype {fix}") as raised:
        load_model(tmp_path, dtype=dtype)
    assert f"{value:.5g} at {last}" in str(raised.value)
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path, dtype=dtype, device="meta")


def test_the_engine_says_it_too(tmp_path):
    write(tmp_path)
    _plant(tmp_path, NAMES[2], 1e6)
    split(tmp_path)
    with pytest.raises(ValueError, match=rf"of-00002\.safetensors: {NAMES[2]} has 1 of 384 values beyond float16"):
        Engine(tmp_path, dtype="float16", device="cpu")


def test_the_largest_values_of_a_type_are_no_overflow(tmp_path):
    write(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for name in NAMES:
            _plant(tmp_path, name, torch.finfo(dtype).max, count=8)
        model = load_model(tmp_path, dtype=dtype)
        assert model.lm_head.weight.max().item() == torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_what_isfinite_says(dtype):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 1000, 5000):
        values = torch.randn(size, generator=generator).to(dtype)
        assert all_finite(values)
        assert all_finite(torch.full((size,), torch.finfo(dtype).max, dtype=dtype)), "though the sum overflows"
        for bad in (float("nan"), float("inf"), float("-inf")):
            spoilt = values.clone()
            spoilt[torch.randint(size, (1,), generator=generator)] = bad
            assert not all_finite(spoilt)
        if size > 1:
            spoilt = values.clone()
            spoilt[0], spoilt[-1] = float("inf"), float("-inf")
            assert not all_finite(spoilt), "infinities that cancel"
