"""Small checkpoints, and ways to change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vexact.models import CausalLM, ModelConfig, load_model, random_model, save_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": 1,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(path: Path, seed: int = 0, **changes: Any) -> CausalLM:
    """A Llama with random weights in ``path``; the keys that tell files apart from models go into config.json alone."""
    config = ModelConfig.from_hf_dict(LLAMA | changes)
    model = random_model(config, seed)
    save_hf(model.named_parameters(), config, path)
    return model


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys; a value of ... removes one."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(file: Path, **changes: torch.Tensor | None) -> None:
    """Sets tensors; None removes one."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def split(path: Path, num_shards: int = 2) -> list[Path]:
    """Turns the single file into shards with an index, tensors dealt in turn."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / WEIGHTS).items()}
    (path / WEIGHTS).unlink()
    files, where = [], {}
    for number in range(num_shards):
        file = path / f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        names = list(tensors)[number::num_shards]
        save_file({name: tensors[name] for name in names}, file, {"format": "pt"})
        where |= dict.fromkeys(names, file.name)
        files.append(file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


def same(path: Path, model: CausalLM) -> bool:
    """Whether the directory loads, and to this model."""
    loaded = dict(load_model(path).named_parameters())
    wanted = dict(model.named_parameters())
    return loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
