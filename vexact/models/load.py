"""Building models: from a Hugging Face directory, or with seeded random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vexact.models.config import ModelConfig
from vexact.models.decoder import CausalLM
from vexact.models.hf_names import from_hf, to_hf

_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ops: str = "invariant",
    attn_impl: str = "triton-invariant",
) -> CausalLM:
    """Loads a checkpoint of a supported architecture.

    Args:
        path: directory with config.json and safetensors, sharded or not.
        ops: "invariant", or "stock" for torch's own kernels.

    Raises:
        FileNotFoundError: no such directory, no config, or no weights in it.
        ValueError: unsupported architecture, or tensors missing or of another shape.
    """
    config = ModelConfig.from_hf_dir(path)
    tensors = _Checkpoint(Path(path))
    model = _empty_model(config, dtype, device, ops, attn_impl)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in from_hf(config, parameters, tensors):
            if tensor.shape != parameters[name].shape:
                want, got = tuple(parameters[name].shape), tuple(tensor.shape)
                raise ValueError(f"{path}: {name} is {got} in the checkpoint, but config.json implies {want}")
            parameters[name].copy_(tensor)
    return model


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ops: str = "invariant",
    attn_impl: str = "triton-invariant",
) -> CausalLM:
    """A model with seeded N(0, initializer_range) weights, unit norms and zero biases; equal on every device."""
    model = _empty_model(config, dtype, device, ops, attn_impl)
    std = float(config.raw.get("initializer_range", 0.02))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return model


def save_hf(named: Iterable[tuple[str, Tensor]], config: ModelConfig, path: str | Path) -> None:
    """Writes parameters (our names) as Hugging Face safetensors with config.json, in shards of at most 4 GiB."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    dtype = None
    for name, tensor in to_hf(config, named):
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size, dtype = size + num_bytes, tensor.dtype
    _write_shards(directory, shards)
    raw = config.raw | {"dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _write_shards(directory: Path, shards: list[dict[str, Tensor]]) -> None:
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _empty_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, ops: str, attn_impl: str
) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(config, ops, attn_impl)
    model.to(dtype).to_empty(device=device)
    model.init_rope(device)
    return model


class _Checkpoint(Mapping[str, Tensor]):
    """The tensors of all safetensors files in a directory, read one at a time."""

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"model directory {directory} has no weights (*.safetensors); "
                "convert the checkpoint with transformers' save_pretrained"
            )
        self._files: dict[str, Any] = {}
        for file in files:
            handle = safe_open(file, framework="pt")
            self._files |= dict.fromkeys(handle.keys(), handle)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
