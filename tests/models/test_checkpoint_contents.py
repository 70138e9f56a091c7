"""Every tensor of a checkpoint is used, or named in a refusal."""

from __future__ import annotations

import pytest
import torch
from checkpoint_support import WEIGHTS, edit_json, edit_weights, same, split, write
from safetensors.torch import load_file

from vexact.models import load_model

LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (f"{LAYER}self_attn.k_proj.bias", (8,), "attention_bias"),
        (f"{LAYER}mlp.down_proj.bias", (16,), "mlp_bias"),
        (f"{LAYER}self_attn.k_norm.weight", (8,), "another model's"),
        (f"{LAYER}pre_feedforward_layernorm.weight", (16,), "another model's"),
        ("model.layers.2.input_layernorm.weight", (16,), "num_hidden_layers=2 is too small"),
        ("model.layers.2.self_attn.rotary_emb.inv_freq", (4,), "num_hidden_layers=2 is too small"),
        (f"{LAYER}self_attn.q_proj.weight_scale", (1,), "quantised"),
        (f"{LAYER}self_attn.q_proj.input_scale", (1,), "quantised"),
        (f"{LAYER}mlp.up_proj.weight_scale_inv", (1,), "quantised"),
        (f"{LAYER}self_attn.q_proj.lora_A.weight", (2, 16), "LoRA"),
        ("model.embed_positions.weight", (64, 16), "another model's"),
        ("score.weight", (2, 16), "another model's"),
        ("lm_head.bias", (40,), "attention_bias or mlp_bias"),
    ],
)
def test_a_tensor_without_use_is_refused(tmp_path, name, shape, reason):
    write(tmp_path)
    edit_weights(tmp_path / WEIGHTS, **{name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .* no use for 1 tensors of the checkpoint: {name}; .*{reason}"):
        load_model(tmp_path)


OLD = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")
THETA = 10000.0 ** -(torch.arange(0, 8, 2) / 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rope", [{}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}])
def test_frequencies_of_old_checkpoints_may_stay_if_they_are_those_of_the_config(tmp_path, dtype, rope):
    wanted = write(tmp_path, **rope)
    edit_weights(
        tmp_path / WEIGHTS, **{name: THETA.to(dtype, copy=True) for name in (*OLD, "model.rotary_emb.inv_freq")}
    )
    assert same(tmp_path, wanted)


@pytest.mark.parametrize(
    "values",
    [
        500000.0 ** -(torch.arange(0, 8, 2) / 8),
        THETA / 4,
        torch.zeros(4),
        torch.full((4,), float("nan")),
        THETA[:3],
        THETA[:, None],
        torch.ones(4, dtype=torch.int64),
    ],
    ids=["theta", "scaled", "zero", "nan", "short", "column", "int"],
)
@pytest.mark.parametrize("name", [OLD[1], "model.rotary_emb.inv_freq"])
def test_frequencies_of_another_model_are_refused(tmp_path, name, values):
    write(tmp_path)
    edit_weights(tmp_path / WEIGHTS, **{name: values.contiguous()})
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: {name} holds other frequencies .*rope_theta=10000, head_dim=8"):
        load_model(tmp_path)


def test_missing_tensors_say_what_lies_there_instead(tmp_path):
    write(tmp_path)
    edit_weights(tmp_path / WEIGHTS, **{"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*: model\.norm\.weight; .*not copied whole"):
        load_model(tmp_path)
    edit_weights(tmp_path / WEIGHTS, **{"norm.weight": torch.ones(16)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight; it holds 1 under names without use: norm\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
    ],
)
@pytest.mark.parametrize("name", [f"{LAYER}mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, dtype, kind, name):
    write(tmp_path)
    old = load_file(tmp_path / WEIGHTS)[name]
    edit_weights(tmp_path / WEIGHTS, **{name: old.to(dtype)})
    with pytest.raises(ValueError, match=rf"{name} is stored as {kind} \(1 such tensors\); it is quantised"):
        load_model(tmp_path)


def test_double_precision_is_refused_because_it_would_be_rounded(tmp_path):
    write(tmp_path)
    edit_weights(tmp_path / WEIGHTS, **{"model.norm.weight": torch.ones(16, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as F64 .* convert the checkpoint to float32"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_may_mix_the_types_that_float32_holds(tmp_path, dtype):
    wanted = write(tmp_path)
    name = f"{LAYER}mlp.up_proj.weight"
    rounded = load_file(tmp_path / WEIGHTS)[name].to(dtype)
    edit_weights(tmp_path / WEIGHTS, **{name: rounded})
    with torch.no_grad():
        wanted.layers[1].mlp.gate_up_proj.weight[24:] = rounded.float()
    assert same(tmp_path, wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.norm.weight", r"lacks 1 tensors that LlamaForCausalLM needs: model\.norm\.weight"),
        (f"{LAYER}self_attn.v_proj.weight", "lacks 1 tensors .*v_proj"),
        ("lm_head.weight", r"lm_head\.weight; is tie_word_embeddings=true missing in config\.json\?"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, message):
    write(tmp_path)
    edit_weights(tmp_path / WEIGHTS, **{name: None})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "name", "got", "want"),
    [
        ({"hidden_size": 32}, "model.embed_tokens.weight", r"\(40, 16\)", r"\(40, 32\)"),
        ({"vocab_size": 41}, "model.embed_tokens.weight", r"\(40, 16\)", r"\(41, 16\)"),
        ({"intermediate_size": 23}, "model.layers.0.mlp.gate_proj.weight", r"\(24, 16\)", r"\(23, 16\)"),
        ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight", r"\(8, 16\)", r"\(16, 16\)"),
        ({"head_dim": 4}, "model.layers.0.self_attn.q_proj.weight", r"\(16, 16\)", r"\(8, 16\)"),
    ],
)
def test_another_shape_is_named_with_both(tmp_path, changes, name, got, want):
    write(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: {name} is {got}, but config\.json implies {want}"):
        load_model(tmp_path)


def test_a_layer_too_many_or_too_few_in_the_configuration(tmp_path):
    write(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 9 tensors .*model\.layers\.2\..* and 4 more"):
        load_model(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"no use for 9 tensors .* and 4 more; num_hidden_layers=1 is too small"):
        load_model(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_beside_a_tied_embedding(tmp_path, shards):
    tied = write(tmp_path, tie_word_embeddings=True)
    embedding = tied.embed_tokens.weight.detach()
    edit_weights(tmp_path / WEIGHTS, **{"lm_head.weight": embedding.clone()})
    if shards > 1:
        split(tmp_path, shards)
    assert same(tmp_path, tied), "an equal head is no other head"


def _one_bit_more(embedding):
    return embedding.nextafter(torch.tensor(9.0))


@pytest.mark.parametrize(
    "head",
    [lambda e: e + 1, _one_bit_more, lambda e: e[:39], lambda e: e.bfloat16(), lambda e: e.T.contiguous()],
    ids=["other", "one bit", "shorter", "rounded", "transposed"],
)
def test_another_head_beside_a_tied_embedding_is_refused(tmp_path, head):
    embedding = write(tmp_path, tie_word_embeddings=True).embed_tokens.weight.detach()
    edit_weights(tmp_path / WEIGHTS, **{"lm_head.weight": head(embedding).clone()})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but .*tie_"):
        load_model(tmp_path)
