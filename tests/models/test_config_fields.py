"""config.json field by field: one message with file, key and value, and never another error."""

from __future__ import annotations

import json
import logging
import re

import pytest
from checkpoint_support import LLAMA, QWEN2, QWEN3, edit_json, write
from hypothesis import given, settings
from hypothesis import strategies as st

from vexact.models import ModelConfig, load_model
from vexact.models.config.refusals import _MUST_BE_OFF, _MUST_BE_ONE
from vexact.prepare.shapes import SHAPES

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "head_dim", "num_key_value_heads"),
)
NO_SIZES = (0, -1, 2.0, 16.5, "16", "", True, False, [16], {}, 10**12, float("inf"), float("nan"))


def refusal(raw, **changes):
    """The message with which a configuration is refused; ... removes a key."""
    changed = {key: value for key, value in (raw | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=r"^config\.json: ") as raised:
        ModelConfig.from_hf_dict(changed)
    return str(raised.value)


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize("key", SIZES)
def test_sizes(key, value):
    message = refusal(LLAMA, **{key: value})
    assert f"{key}={json.dumps(value)}" in message
    assert "must be a whole number from 1 to " in message


@pytest.mark.parametrize("key", SIZES[:5])
def test_sizes_that_have_to_be_there(key):
    assert f"config.json: {key} is missing" in refusal(LLAMA, **{key: ...})
    assert f"{key}=null" in refusal(LLAMA, **{key: None})


def test_sizes_with_a_default():
    plain = {key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")}
    config = ModelConfig.from_hf_dict(plain)
    assert (config.head_dim, config.num_kv_heads) == (8, 2)
    assert ModelConfig.from_hf_dict(LLAMA | {"head_dim": None, "num_key_value_heads": None}) is not None
    assert "max_position_embeddings=null" in refusal(LLAMA, max_position_embeddings=None)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads=4 must divide num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must be a whole number from 1 to 2"),
        ({"head_dim": 7}, "head_dim=7 makes heads of 7 values; rotary embedding needs an even number"),
        ({"head_dim": None, "hidden_size": 18}, "hidden_size=18 makes heads of 9 values"),
        ({"head_dim": ..., "hidden_size": 17}, "hidden_size=17 is no multiple of num_attention_heads, 2"),
    ],
)
def test_heads(changes, part):
    assert part in refusal(LLAMA, **changes)


@pytest.mark.parametrize("value", [0, 0.0, -1e-6, None, "1e-6", True, float("nan"), float("inf"), 2, [1e-6]], ids=repr)
def test_norm_epsilon(value):
    assert f"rms_norm_eps={json.dumps(value)} must be a number from" in refusal(LLAMA, rms_norm_eps=value)


@pytest.mark.parametrize("value", [None, 0, 1, "true", "false", [], {}], ids=repr)
@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"])
def test_flags(key, value):
    assert f"{key}={json.dumps(value)} must be true or false" in refusal(LLAMA, **{key: value})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"architectures": ...}, "architectures is missing"),
        ({"architectures": None}, "architectures=null"),
        ({"architectures": []}, "architectures=[]"),
        ({"architectures": "LlamaForCausalLM"}, 'architectures="LlamaForCausalLM"'),
        ({"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]}, "must be a list with one"),
        ({"architectures": ["LlamaModel"]}, 'architectures=["LlamaModel"]'),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures=[["),
        ({"architectures": [None]}, "architectures=[null]"),
        ({"architectures": ["OlmoeForCausalLM"]}, "supported: LlamaForCausalLM"),
        ({"model_type": "mistral"}, 'model_type="mistral" is not supported; supported: llama'),
        ({"model_type": "qwen3"}, 'model_type="qwen3" is not supported; supported: llama'),
        ({"model_type": None}, "model_type=null"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"hidden_act": None}, "hidden_act=null"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
        ({"layer_types": ["full_attention"]}, 'must be absent or 2 (num_hidden_layers) times "full_attention"'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ({"use_qk_norm": True}, "use_qk_norm=true is not what LlamaForCausalLM computes"),
        ({"initializer_range": "0.02"}, 'initializer_range="0.02"'),
        ({"initializer_range": -1}, "initializer_range=-1"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map"),
    ],
)
def test_what_the_model_is(changes, part):
    assert part in refusal(LLAMA, **changes)


def test_biases_that_an_architecture_does_not_have():
    assert "mlp_bias=true is not what Qwen3ForCausalLM computes" in refusal(QWEN3, mlp_bias=True)
    assert "mlp_bias=true is not what Qwen2ForCausalLM computes" in refusal(QWEN2, mlp_bias=True)
    assert "qk_norm=false" in refusal(QWEN3, qk_norm=False)
    assert ModelConfig.from_hf_dict(LLAMA | {"mlp_bias": True}).mlp_bias


@pytest.mark.parametrize("key", sorted(_MUST_BE_OFF))
def test_keys_that_would_change_the_function(key):
    for value in (0.1, 1, True, "0", [1], {"a": 1}, -1, float("nan")):
        assert f"config.json: {key}=" in refusal(LLAMA, **{key: value})


@pytest.mark.parametrize("key", sorted(_MUST_BE_ONE))
def test_factors_that_would_change_the_function(key):
    for value in (0, 0.5, 12.0, True, "1", [1], float("nan")):
        assert f"config.json: {key}=" in refusal(LLAMA, **{key: value})


def test_the_same_keys_where_they_change_nothing():
    off = dict.fromkeys(_MUST_BE_OFF, None) | {"attention_dropout": 0.0, "is_encoder_decoder": False, "num_experts": 0}
    one = dict.fromkeys(_MUST_BE_ONE, 1.0) | {"logits_scaling": None, "embedding_multiplier": 1}
    qwen = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1, "pretraining_tp": 1}
    layers = {"layer_types": ["full_attention", "full_attention"]}
    assert ModelConfig.from_hf_dict(QWEN3 | off | one | qwen | layers | {"qk_norm": True}).qk_norm


def test_unknown_keys_are_mentioned_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ModelConfig.from_hf_dict(LLAMA | {"my_own_key": 1, "another": None, "torch_dtype": "bfloat16"})
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: these keys are not known here and change nothing: another, my_own_key"
    ]


@pytest.mark.parametrize("arch", SHAPES)
def test_published_configurations_say_nothing_unknown(arch, caplog):
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_hf_dict(SHAPES[arch])
    assert caplog.records == []


@pytest.mark.parametrize("value", [40, -1, 1.0, "1", True, [1, 40], [1, "2"], [[1]], {}, [None], 10**30], ids=repr)
def test_stop_tokens(tmp_path, value):
    assert "eos_token_id=" in refusal(LLAMA, eos_token_id=value)
    write(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=value)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.* must be a token id from 0 to 39"):
        load_model(tmp_path)


def test_stop_tokens_that_are_right(tmp_path):
    write(tmp_path)
    for value, ids in ((0, (0,)), (39, (39,)), ([3, 4], (3, 4)), ([], ()), (None, (1,)), (..., (1,))):
        edit_json(tmp_path / "generation_config.json", eos_token_id=value, temperature=0.6, pad_token_id=None)
        assert ModelConfig.from_hf_dir(tmp_path).eos_token_ids == ids


@pytest.mark.parametrize(
    "content", ["[]", "3", '"text"', "null", "{", '{"eos_token_id": 1, "eos_token_id": 2}', "\ufeff{}"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_hold_no_object(tmp_path, name, content):
    write(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name} "):
        load_model(tmp_path)


def test_json_that_python_cannot_take(tmp_path):
    write(tmp_path)
    for content in ("[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", '{"a": "\ud800"}'):
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            load_model(tmp_path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization", "quant_config"])
def test_quantised_files(tmp_path, key):
    write(tmp_path)
    edit_json(tmp_path / "config.json", **{key: None})
    load_model(tmp_path)
    edit_json(tmp_path / "config.json", **{key: {"quant_method": "fp8"}})
    with pytest.raises(ValueError, match=rf"config\.json: {key}=.* weights are quantised"):
        load_model(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(raw=st.sampled_from([LLAMA, QWEN2, QWEN3]), key=st.sampled_from(sorted({*LLAMA, *_MUST_BE_OFF})), value=JSON)
def test_any_value_under_any_key(raw, key, value):
    """Either it is taken, and is of the right kind, or the message names the file and the key."""
    try:
        config = ModelConfig.from_hf_dict(raw | {key: value})
    except ValueError as error:
        named = re.match(r"config\.json: (\w+)", str(error))
        blamed = named[1] if named else None
        # what depends on a size is blamed for not fitting it
        right = blamed == key or (blamed in LLAMA and key in ("num_attention_heads", "num_hidden_layers", "vocab_size"))
    else:
        right = all(type(getattr(config, name)) is int for name in ("vocab_size", "num_layers", "num_kv_heads"))
        right &= config.num_heads % config.num_kv_heads == 0 == config.head_dim % 2
        right &= all(type(token) is int and 0 <= token < config.vocab_size for token in config.eos_token_ids)
    assert right


def test_the_pad_row_is_a_row_of_the_embedding():
    """Counted from the end where it is negative, as torch.nn.Embedding takes what old Llama files say."""
    plain = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    plain |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    rows = [ModelConfig.from_hf_dict(plain | {"pad_token_id": value}).padding_idx for value in (None, 0, 8, -1)]
    assert rows == [None, 0, 8, 8]
    assert ModelConfig.from_hf_dict(plain).padding_idx is None
    for value in (9, -10, True, "2", 1.0):
        with pytest.raises(ValueError, match=r"config\.json: pad_token_id=.* must be a token id from 0 to 8"):
            ModelConfig.from_hf_dict(plain | {"pad_token_id": value})
