"""Checkpoints with experts and latent attention: against transformers, however they are stored; what is refused."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from checkpoint_support import WEIGHTS, edit_json, edit_weights, same, split
from families import ROUTERS_ARE_MODULES
from moe_configs import DEEPSEEK_V3, FAMILIES, MOONLIGHT
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vexact.models import CausalLM, ModelConfig, load_model, parameter_dtype, random_model, save_hf
from vexact.models.checkpoint import CheckpointReader
from vexact.models.load import load_parts, model_of
from vexact.models.nonfinite import find_nonfinite
from vexact.ops import PackedMetadata

LENGTHS = [37, 60, 1, 20]
ROUTER = "model.layers.1.mlp.gate."


def transformers_model(family, dtype=torch.float32):
    """Of the family's shape, with weights and a correction bias that make a difference."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**FAMILIES[family])
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    for parameter in hf.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.2)
    for name, buffer in hf.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.1)
    return hf.to(dtype)


@pytest.fixture(scope="module", params=[one for one in FAMILIES if ROUTERS_ARE_MODULES or "deepseek-v2" not in one])
def saved(request, tmp_path_factory):
    """(family, transformers' model, directory that it was saved to)."""
    path = tmp_path_factory.mktemp(request.param)
    hf = transformers_model(request.param)
    hf.save_pretrained(path)
    return request.param, hf, path


def logits(model: CausalLM, ids):
    with torch.no_grad():
        positions = torch.cat([torch.arange(n) for n in LENGTHS])
        return model.logits(model(ids, positions, PackedMetadata.from_lengths(LENGTHS)))


def tokens(seed=1):
    return torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_transformers(saved):
    """Its eager model in fp64, to a few roundings of fp32; the softmax of its router stays fp32 there too."""
    family, _, path = saved
    ids, reference = tokens(), transformers_model(family).double()
    wanted = torch.cat([reference(part[None]).logits[0] for part in ids.split(LENGTHS)])
    for ops in ("invariant", "stock"):
        torch.testing.assert_close(logits(load_model(path, ops=ops), ids).double(), wanted, rtol=2e-5, atol=5e-5)


@torch.no_grad()
def test_names_and_weights_round_trip(saved, tmp_path):
    """What we write has the names, shapes and values that transformers writes, and it computes the same with them."""
    _, hf, path = saved
    model = load_model(path)
    save_hf(model.named_parameters(), model.config, tmp_path)
    original, ours = load_file(path / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert original.keys() == ours.keys()
    assert all(torch.equal(original[name], ours[name]) for name in original)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, hf(ids).logits)


def test_fused_tensors_are_read_too(saved, tmp_path):
    """As a transformers module holds them, (E, 2I, H) and (E, H, I); any mixture of both forms."""
    _, hf, path = saved
    model = load_model(path)
    hf.save_pretrained(tmp_path, save_original_format=False)
    fused = load_file(tmp_path / WEIGHTS)
    assert fused["model.layers.1.mlp.experts.gate_up_proj"].dim() == 3
    assert same(tmp_path, model)
    single = load_file(path / WEIGHTS)
    down = "model.layers.1.mlp.experts.down_proj"
    single = {
        name: t for name, t in single.items() if not re.search(r"layers\.1\..*experts\.\d+\.(down_proj|w2)", name)
    }
    save_file({**single, down: fused[down]}, tmp_path / WEIGHTS, {"format": "pt"})
    assert same(tmp_path, model)


class Rank:
    """Loads the rows that FSDP2 gives to one of several ranks."""

    def __init__(self, model, rank, num_ranks):
        self.rows = {name: _rows(len(p), rank, num_ranks) for name, p in model.named_parameters()}

    def load(self, path):
        everything = {"dtype": torch.float32, "device": "cpu", "ops": "invariant", "attn_impl": "triton-invariant"}
        return load_parts(path, self.cut, self.own, **everything)

    def cut(self, model):
        self.model = model
        for name, parameter in list(model.named_parameters()):
            module, _, last = name.rpartition(".")
            own = nn.Parameter(parameter[self.rows[name]], requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(module), last, own)

    def own(self, parameter):
        name = next(name for name, other in self.model.named_parameters() if other is parameter)
        return parameter, self.rows[name].start


def _rows(count, rank, num_ranks):
    chunk = -(-count // num_ranks)
    return slice(min(count, rank * chunk), min(count, (rank + 1) * chunk))


def test_a_rank_reads_its_own_rows(saved, tmp_path):
    _, hf, path = saved
    model = load_model(path)
    hf.save_pretrained(tmp_path, save_original_format=False)
    for source, num_ranks in ((path, 3), (tmp_path, 3), (path, 8)):
        for rank in range(num_ranks):
            mine = Rank(model, rank, num_ranks)
            part = mine.load(source)
            for name, parameter in model.named_parameters():
                assert torch.equal(part.get_parameter(name), parameter[mine.rows[name]]), name


def test_the_experts_of_other_ranks_are_not_opened(tmp_path, monkeypatch):
    config = ModelConfig.from_hf_dict(MOONLIGHT)
    model = random_model(config, 0)
    save_hf(model.named_parameters(), config, tmp_path)
    opened = []
    plain = CheckpointReader.tensor
    monkeypatch.setattr(CheckpointReader, "tensor", lambda self, name: opened.append(name) or plain(self, name))
    Rank(model, 1, 4).load(tmp_path)
    assert {int(found[1]) for name in opened if (found := re.search(r"\.experts\.(\d+)\.", name))} == {2, 3}


def test_the_correction_bias_stays_fp32(tmp_path):
    """Loaded, cast, moved and saved; the reference keeps it in fp32, and its rounding would change routes."""
    transformers_model("moonlight", torch.bfloat16).save_pretrained(tmp_path)
    bias = load_file(tmp_path / WEIGHTS)[f"{ROUTER}e_score_correction_bias"].float() + 1e-4
    edit_weights(tmp_path / WEIGHTS, **{f"{ROUTER}e_score_correction_bias": bias})
    assert not torch.equal(bias, bias.bfloat16().float())
    model = load_model(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter_dtype(name, torch.bfloat16)
    held = dict(model.named_parameters())["layers.1.mlp.router.bias"]
    assert torch.equal(held, bias)
    assert not held.requires_grad
    assert torch.equal(model.float().bfloat16().layers[1].mlp.router.bias, bias)
    save_hf(model.named_parameters(), model.config, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / WEIGHTS)
    assert torch.equal(ours[f"{ROUTER}e_score_correction_bias"], bias)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    copy = model_of(model.config, dict(model.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))


def test_layers_that_predict_later_tokens_are_left_out(tmp_path, caplog):
    transformers_model("moonlight").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    more = {
        "model.layers.3.eh_proj.weight": torch.ones(2),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.ones(1),
    }
    edit_weights(tmp_path / WEIGHTS, **more)
    edit_json(tmp_path / "config.json", num_nextn_predict_layers=1)
    with caplog.at_level(logging.WARNING):
        assert same(tmp_path, model)
    assert [r.message for r in caplog.records if "2 tensors of 1 more layers are not read" in r.message]
    edit_json(tmp_path / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"num_hidden_layers=3 is too small"):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    config, path = ModelConfig.from_hf_dict(DEEPSEEK_V3), tmp_path_factory.mktemp("deepseek")
    save_hf(random_model(config, 0).named_parameters(), config, path)
    return path


MISTAKES = [
    ({"model.layers.1.mlp.experts.7.up_proj.weight": None}, r"lacks 1 tensors .*layers\.1\.mlp\.experts\.7\.up_proj"),
    ({f"{ROUTER}e_score_correction_bias": None}, r"lacks 1 tensors .*e_score_correction_bias"),
    (
        {"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(20, 32)},
        r"no use for 1 tensors .*experts\.8\.up_proj.* config\.json says 8 experts",
    ),
    (
        {"model.layers.2.mlp.experts.gate_up_proj": torch.ones(8, 40, 32)},
        r"no use for 1 tensors .*layers\.2\.mlp\.experts\.gate_up_proj; the experts of that layer are there twice",
    ),
    (
        {
            "model.layers.2.mlp.experts.gate_up_proj": torch.ones(8, 40, 32),
            "model.layers.2.mlp.experts.3.up_proj.weight": None,
        },
        r"lacks 1 tensors .*experts\.3\.up_proj.*; it holds .*layers\.2\.mlp\.experts\.gate_up_proj and some experts",
    ),
    (
        {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(20, 32)},
        r"no use for 1 .*config\.json says that layer 0 has no experts, .*correct first_k_dense_replace",
    ),
    (
        {"model.layers.1.mlp.up_proj.weight": torch.ones(40, 32)},
        r"no use for 1 .*config\.json says that layer 1 has experts, .*correct first_k_dense_replace",
    ),
    (
        {"model.layers.1.mlp.experts.2.up_proj.bias": torch.ones(20)},
        r"no use for 1 .*the experts of DeepseekV3ForCausalLM have no biases",
    ),
    (
        {"model.layers.1.mlp.experts.gate_up_proj_bias": torch.ones(8, 40)},
        r"no use for 1 .*the experts of DeepseekV3ForCausalLM have no biases",
    ),
    (
        {"model.layers.2.mlp.experts.3.down_proj.weight": torch.ones(20, 32)},
        r"experts\.3\.down_proj\.weight is \(20, 32\), but config\.json implies \(32, 20\)",
    ),
    ({f"{ROUTER}weight": torch.ones(7, 32)}, r"gate\.weight is \(7, 32\), but config\.json implies \(8, 32\)"),
    (
        {"model.layers.1.mlp.experts.5.up_proj.weight": torch.full((20, 32), float("nan"))},
        r"experts\.5\.up_proj\.weight has 640 of 640 values that are not finite",
    ),
    (
        {f"{ROUTER}e_score_correction_bias": torch.full((8,), float("inf"))},
        r"e_score_correction_bias has 8 of 8 values",
    ),
    ({"model.layers.1.self_attn.kv_a_layernorm.weight": None}, r"lacks 1 tensors .*kv_a_layernorm"),
]


SHAPES = {"gate_up_proj": (8, 40, 32), "down_proj": (8, 32, 20)}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shape", ["an expert less", "one more", "transposed", "flat", "half"])
def test_tensors_of_all_experts_in_another_shape(deepseek, tmp_path, name, shape):
    """As other architectures and other numbers of experts would have them."""
    for file in deepseek.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    experts, rows, columns = SHAPES[name]
    wrong = {
        "an expert less": (experts - 1, rows, columns),
        "one more": (experts + 1, rows, columns),
        "transposed": (experts, columns, rows),
        "flat": (experts * rows, columns),
        "half": (experts, rows // 2, columns),
    }[shape]
    single = [n for n in load_file(tmp_path / WEIGHTS) if re.search(r"layers\.1\.mlp\.experts\.\d+\.", n)]
    whole = {f"model.layers.1.mlp.experts.{other}": torch.ones(size) for other, size in SHAPES.items()}
    whole[f"model.layers.1.mlp.experts.{name}"] = torch.ones(wrong)
    edit_weights(tmp_path / WEIGHTS, **dict.fromkeys(single), **whole)
    expected = re.escape(f"model.layers.1.mlp.experts.{name} is {wrong}, but config.json implies {SHAPES[name]}")
    with pytest.raises(ValueError, match=expected):
        load_model(tmp_path)


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_named(deepseek, tmp_path, changes, message):
    for file in deepseek.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_weights(tmp_path / WEIGHTS, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    files = split(tmp_path, 3)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, device="meta")
    assert len(files) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"first_k_dense_replace": 2},
            r"layer 1 has no experts, the checkpoint holds model\.layers\.1\.mlp\..*; correct first_k",
        ),
        (
            {"first_k_dense_replace": 0},
            r"layer 0 has experts, the checkpoint holds model\.layers\.0\.mlp\.down_proj\.weight; correct",
        ),
        ({"moe_layer_freq": 2}, r"layer 1 has no experts, .*; correct first_k_dense_replace, moe_layer_freq"),
        ({"n_routed_experts": 12}, r"lacks .* config\.json says 12 experts; that number is wrong, or"),
        ({"n_routed_experts": 4, "n_group": 2}, r"no use for .*experts\.4\..* config\.json says 4 experts"),
        (
            {"n_shared_experts": 3},
            r"shared_experts\.gate_proj\.weight is \(40, 32\), but config\.json implies \(60, 32\)",
        ),
        ({"kv_lora_rank": 23}, r"kv_a_proj_with_mqa\.weight is \(32, 32\), but config\.json implies \(31, 32\)"),
    ],
)
def test_a_configuration_of_another_model_is_named(deepseek, tmp_path, changes, message):
    for file in deepseek.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "config.json", **{"moe_layer_freq": 1} | changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_mistakes_in_fused_tensors_are_named(tmp_path):
    transformers_model("qwen3-moe").save_pretrained(tmp_path, save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    good = load_file(tmp_path / WEIGHTS)[name]
    for wrong in (good.transpose(1, 2).contiguous(), good[:7].clone(), good.flatten(0, 1)):
        edit_weights(tmp_path / WEIGHTS, **{name: wrong})
        with pytest.raises(ValueError, match=r"gate_up_proj is \(.*\), but config\.json implies \(8, 40, 32\)"):
            load_model(tmp_path)
    edit_weights(tmp_path / WEIGHTS, **{name: good.index_fill(0, torch.tensor([6]), float("nan"))})
    with pytest.raises(ValueError, match=r"gate_up_proj has 1280 of 10240 .* at \[6, 0, 0\]"):
        load_model(tmp_path)


def test_random_weights_are_those_of_the_seed():
    config = ModelConfig.from_hf_dict(DEEPSEEK_V3)
    first, again, other = (dict(random_model(config, seed).named_parameters()) for seed in (0, 0, 1))
    experts = first["layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(experts, again["layers.1.mlp.experts.gate_up_proj"])
    assert not torch.equal(experts, other["layers.1.mlp.experts.gate_up_proj"])
    assert abs(experts.std().item() - 0.2) < 0.01
    assert first["layers.1.attention.kv_a_norm.weight"].unique().tolist() == [1.0]
    assert first["layers.1.mlp.router.bias"].unique().tolist() == [0.0]


def test_a_number_that_is_none_is_found_among_the_experts():
    model = random_model(ModelConfig.from_hf_dict(DEEPSEEK_V3), 0)
    with torch.no_grad():
        model.layers[2].mlp.experts.down_proj[5, 3, 1] = float("nan")
    found = find_nonfinite(model.named_parameters())
    assert found == "layers.2.mlp.experts.down_proj holds 1 non-finite number of 5120, the first nan at [5, 3, 1]"
