import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from vexact.models import ModelConfig, load_model, save_hf
from vexact.ops import PackedMetadata

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES = {
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=24, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=40, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen2-tied-mha": Qwen2Config(**SHAPE | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-bias": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-linear": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
}


def _hf_checkpoint(family, path):
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(FAMILIES[family])
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.2)
    hf.save_pretrained(path)
    return hf


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ops", ["invariant", "stock"])
def test_logits_match_transformers(family, ops, tmp_path):
    hf = _hf_checkpoint(family, tmp_path)
    model = load_model(tmp_path, ops=ops)
    lengths = [37, 100, 1, 200]
    ids = torch.randint(0, 97, (sum(lengths),))
    positions = torch.cat([torch.arange(n) for n in lengths])
    ours = model.logits(model(ids, positions, PackedMetadata.from_lengths(lengths)))
    for part, row in zip(ids.split(lengths), ours.split(lengths), strict=True):
        torch.testing.assert_close(row, hf(part[None]).logits[0].float(), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_weights_round_trip(family, tmp_path):
    hf = _hf_checkpoint(family, tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    save_hf(model.named_parameters(), model.config, tmp_path / "ours")
    original, saved = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "ours"))
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[name], saved[name]) for name in original)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, hf(ids).logits)


def test_sharded_checkpoints_round_trip(tmp_path, monkeypatch):
    _hf_checkpoint("qwen3", tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    monkeypatch.setattr("vexact.models.load.MAX_SHARD_BYTES", 40_000)
    save_hf(model.named_parameters(), model.config, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    again = load_model(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    _hf_checkpoint("qwen3-tied", tmp_path)
    model = load_model(tmp_path)
    ids, metadata = torch.arange(30), PackedMetadata.from_lengths([30])
    grads = []
    for recomputed in range(len(model.layers) + 1):
        model.recomputed_layers = recomputed
        model.zero_grad()
        model(ids, ids, metadata).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert len(grads) >= 3
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


def test_stop_tokens_come_from_the_generation_config(tmp_path):
    _hf_checkpoint("qwen3", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert ModelConfig.from_hf_dir(tmp_path).eos_token_ids == (5, 9)


def _edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r'architectures=\["GPT2LMHeadModel"\] .* supported: Llama'),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            'rope_type="longrope" is not supported; supported: default',
        ),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported; supported: silu'),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.* weights are quantised"),
    ],
)
def test_unsupported_models_are_refused(tmp_path, changes, message):
    _hf_checkpoint("qwen3", tmp_path)
    _edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_broken_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(tmp_path)
    _hf_checkpoint("qwen3", tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_model(tmp_path)
