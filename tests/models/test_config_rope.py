"""Rotary embedding in both spellings of config.json, against transformers, and everything that is refused."""

from __future__ import annotations

import pytest
import torch
from checkpoint_support import LLAMA, QWEN3, edit_json, write
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vexact.models import ModelConfig
from vexact.models.config import RopeConfig
from vexact.models.rotary import cos_sin_table

PLAIN = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(raw=PLAIN, **changes):
    return ModelConfig.from_hf_dict(raw | changes).rope


def refusal(**changes):
    with pytest.raises(ValueError, match=r"^config\.json: ") as raised:
        rope(**changes)
    return str(raised.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SPELLINGS = {
    "nothing": {},
    "theta": {"rope_theta": 5e5},
    "an integer theta": {"rope_theta": 1000000},
    "null scaling": {"rope_theta": 1e6, "rope_scaling": None},
    "old linear": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4}},
    "both type keys": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
    "old llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "new without a type": {"rope_parameters": {"rope_theta": 1e6}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5}},
    "new llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "new beside a theta": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "new beside the same old": dict.fromkeys(("rope_parameters", "rope_scaling"), LLAMA3 | {"rope_theta": 5e5}),
    "new linear beside old": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        "rope_scaling": {"type": "linear", "rope_theta": 1e6, "factor": 2.0},
    },
    "new yarn": {"rope_parameters": YARN | {"rope_theta": 1e6}},
    "old yarn": {
        "rope_theta": 5e4,
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
    },
    "yarn with bands": {"rope_parameters": YARN | {"rope_theta": 100.0, "beta_fast": 4, "beta_slow": 0.5}},
    "yarn between frequencies": {"rope_parameters": YARN | {"rope_theta": 1e4, "beta_fast": 2, "truncate": False}},
    "yarn with a factor of its own": {"rope_parameters": YARN | {"rope_theta": 1e4, "attention_factor": 1.25}},
    "yarn of DeepSeek": {"rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "yarn of two factors": {"rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn with one factor alone": {"rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 2.0, "mscale_all_dim": 0}},
    "yarn without bands": {"rope_parameters": YARN | {"rope_theta": 1e4, "beta_fast": None, "beta_slow": None}},
    "rotated whole": {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_frequencies_are_those_of_transformers(tmp_path, spelling):
    write(tmp_path)
    edit_json(tmp_path / "config.json", **{"rope_parameters": ...} | SPELLINGS[spelling])
    config = ModelConfig.from_hf_dir(tmp_path)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.arange(64)
    cos, sin = theirs(torch.zeros(1), positions[None])
    table = cos_sin_table(config.rope, config.head_dim, 64)
    torch.testing.assert_close(table[:, :4], cos[0, :, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[:, 4:], sin[0, :, :4], rtol=1e-5, atol=1e-5)


def test_defaults():
    assert rope() == rope(rope_parameters=None, rope_scaling={}) == RopeConfig()
    assert rope(QWEN3).theta == 10000.0


@pytest.mark.parametrize(
    "value", [0, -1, 0.5, None, "10000", "", True, [1e4], float("nan"), float("inf"), 1e300], ids=repr
)
def test_theta(value):
    assert "rope_theta=" in refusal(rope_theta=value)
    assert "rope_parameters.rope_theta=" in refusal(rope_parameters={"rope_theta": value})


@pytest.mark.parametrize("value", [0, -2.0, 0.5, "2", True, float("nan"), float("inf"), [2]], ids=repr)
@pytest.mark.parametrize("scaling", [{"type": "linear"}, LLAMA3], ids=["linear", "llama3"])
def test_factor(scaling, value):
    assert "rope_scaling.factor=" in refusal(rope_scaling=scaling | {"factor": value})
    without = {key: item for key, item in scaling.items() if key != "factor"}
    assert "rope_scaling.factor is missing" in refusal(rope_scaling=without)


@pytest.mark.parametrize("key", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [..., 0, -1, "8192", True, float("nan")], ids=repr)
def test_llama3(key, value):
    changed = {name: item for name, item in (LLAMA3 | {key: value}).items() if item is not ...}
    assert f"rope_parameters.{key}" in refusal(rope_parameters=changed)


@pytest.mark.parametrize(("low", "high"), [(4.0, 1.0), (2.0, 2.0), (5, 4)])
def test_llama3_bands(low, high):
    message = refusal(rope_scaling=LLAMA3 | {"low_freq_factor": low, "high_freq_factor": high})
    assert "rope_scaling.low_freq_factor=" in message
    assert "must be less than high_freq_factor" in message


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"])
@pytest.mark.parametrize("value", [-1, "1", [1.0], float("nan")], ids=repr)
def test_yarn(key, value):
    assert f"rope_parameters.{key}=" in refusal(rope_parameters=YARN | {key: value})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"beta_slow": 33}, "rope_parameters.beta_slow=33 must be at most beta_fast, which is 32"),
        ({"rope_theta": 1.0}, "rope_parameters.rope_theta=1.0 must be more than 1"),
        ({"original_max_position_embeddings": ...}, "original_max_position_embeddings is missing"),
        ({"factor": None}, "rope_parameters.factor=null must be a number"),
        ({"low_freq_factor": 1.0}, "low_freq_factor=1.0 does not belong to rope_type yarn"),
    ],
)
def test_yarn_as_a_whole(changes, part):
    changed = {name: item for name, item in (YARN | changes).items() if item is not ...}
    assert part in refusal(rope_parameters=changed)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", None, 3, ["linear"]])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_types(kind, key):
    assert f"rope_scaling.{key}=" in refusal(rope_scaling={key: kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rope_scaling": {"factor": 4.0}}, "factor=4.0 does not belong to rope_type default"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "factor=4.0"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "low_freq_factor": 1.0}}, "low_freq_factor=1.0"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "rope_scaling.type="),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}}, "contradicts"),
        ({"rope_scaling": "linear"}, 'rope_scaling="linear" must be an object'),
        ({"rope_parameters": [1]}, "rope_parameters=[1] must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.rope_theta=10000.0 contradicts"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}},
            "is not the same in rope_parameters",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            "rope_theta=500000.0 is not the same",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "is not the same in rope_parameters",
        ),
        (
            {"original_max_position_embeddings": 64, "rope_scaling": LLAMA3},
            "embeddings=32 contradicts",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor=0"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor=true"),
        ({"partial_rotary_factor": "1"}, "partial_rotary_factor="),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"rotary_pct": 0.25}, "rotary_pct=0.25"),
    ],
)
def test_what_contradicts_or_is_not_supported(changes, part):
    assert part in refusal(**changes)
