"""Building models, from a Hugging Face directory or with seeded random weights, and saving them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vexact.device import usable_device
from vexact.models.checkpoint import CheckpointReader, Shape, write_checkpoint
from vexact.models.checkpoint.values import all_finite, refuse_values
from vexact.models.config import ModelConfig
from vexact.models.contents import check_contents
from vexact.models.decoder import CausalLM
from vexact.models.hf_names import matrix, stored_sources, to_hf

MAX_SHARD_BYTES = 4 << 30


def to_empty(model: CausalLM, device: torch.device) -> None:
    """Memory of unknown values for every tensor of a model on the meta device."""
    model.to_empty(device=device)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ops: str = "invariant",
    attn_impl: str = "triton-invariant",
    allocate: Callable[[CausalLM, torch.device], None] = to_empty,
) -> CausalLM:
    """Loads a checkpoint of a supported architecture.

    Every tensor of the checkpoint is used, or the checkpoint is refused. On the device "meta" all is checked and
    nothing is kept.

    Args:
        path: directory with config.json and safetensors, sharded or not.
        ops: "invariant", or "stock" for torch's own kernels.
        allocate: gives the parameters of a model on the meta device memory, of unknown values.

    Raises:
        FileNotFoundError: no such directory, no config, or no weights in it.
        ValueError: a damaged file or config, an unsupported architecture, tensors missing, left over or of another
            shape, values that are not finite or not so in ``dtype``, a device that is not there. The message names it.
    """
    return load_parts(
        path,
        lambda model: None,
        whole,
        dtype=dtype,
        device=device,
        ops=ops,
        attn_impl=attn_impl,
        allocate=allocate,
    )


def whole(parameter: Tensor) -> tuple[Tensor, int]:
    """All rows of a parameter."""
    return parameter, 0


def no_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """None: names and shapes are checked, and no value is read."""
    return parameter[:0], 0


def load_parts(
    path: str | Path,
    shard: Callable[[CausalLM], None],
    own: Callable[[Tensor], tuple[Tensor, int]],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: str,
    attn_impl: str,
    allocate: Callable[[CausalLM, torch.device], None] = to_empty,
) -> CausalLM:
    """``load_model`` where a process keeps some rows of each parameter only.

    Args:
        shard: divides the model in place while it is still on the meta device.
        own: for a parameter, the tensor that holds the rows kept here, and the index of the first.
        allocate: as of ``load_model``.
    """
    device = usable_device(device)
    config = ModelConfig.from_hf_dir(path)
    model = _meta_model(config, dtype, ops, attn_impl)
    with CheckpointReader(path) as reader, torch.no_grad():
        sources = {name: stored_sources(config, name, reader) for name, _ in model.named_parameters()}
        check_contents(reader, config, _shapes(config, model, sources))
        shard(model)
        _allocate(model, device, allocate)
        for name, parameter in model.named_parameters():
            _read(reader, sources[name], *own(parameter))
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
    model = _allocate(_meta_model(config, dtype, ops, attn_impl), usable_device(device))
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


def model_of(config: ModelConfig, named: Mapping[str, Tensor], device: torch.device | str = "cpu") -> CausalLM:
    """A model on the invariant operators with copies of these parameters: all of them, whole, of the model's dtype."""
    dtype = next(iter(named.values())).dtype  # the embedding's
    model = _allocate(_meta_model(config, dtype, "invariant", "triton-invariant"), device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(named[name])
    return model


def save_hf(named: Iterable[tuple[str, Tensor]], config: ModelConfig, path: str | Path) -> None:
    """Writes parameters (our names) as Hugging Face safetensors with config.json, in shards of at most 4 GiB.

    The model in ``path`` is replaced by this one, stop tokens included: a save that is killed leaves the old one, the
    new one, or a directory that is refused.
    """
    stop = {"eos_token_id": list(config.eos_token_ids)} if config.eos_token_ids else None
    write_checkpoint(path, to_hf(config, named), config.raw, stop, MAX_SHARD_BYTES)


def _meta_model(config: ModelConfig, dtype: torch.dtype, ops: str, attn_impl: str) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config, ops, attn_impl).to(dtype)


def _allocate(
    model: CausalLM,
    device: torch.device | str,
    allocate: Callable[[CausalLM, torch.device], None] = to_empty,
) -> CausalLM:
    allocate(model, torch.device(device))
    model.init_rope(device)
    return model


def _shapes(config: ModelConfig, model: CausalLM, sources: Mapping[str, list[str]]) -> dict[str, Shape]:
    """What each tensor of the checkpoint has to be, under the names that it uses."""
    shapes: dict[str, Shape] = {}
    for name, parameter in model.named_parameters():
        parts = dict(to_hf(config, [(name, parameter)]))
        renamed = sources[name] != list(parts)
        shapes |= {sources[name][0]: parameter.shape} if renamed else {part: t.shape for part, t in parts.items()}
    return {source: tuple(shape) for source, shape in shapes.items()}


def _read(reader: CheckpointReader, sources: list[str], rows: Tensor, first: int) -> None:
    """Fills rows ``first`` and on of one parameter from its tensors, and looks at what came of them in their dtype.

    Of experts, only tensors and pages are read that hold some of the rows.
    """
    each = rows.shape[1] if rows.dim() == 3 else 1  # rows of a matrix for one expert
    rows, first = matrix(rows), first * each
    start, end = 0, first + len(rows)
    for source in sources:
        stop = start + _num_rows(reader.shape(source))
        low, high = max(start, first), min(stop, end)
        if low < high:
            stored, part = reader.tensor(source), rows[low - first : high - first]
            values = matrix(stored)[low - start : high - start]
            part.copy_(values)
            if not all_finite(values.to(part.dtype) if part.is_meta else part):
                refuse_values(stored, part.dtype, source, reader.file(source))
        start = stop


def _num_rows(shape: Shape) -> int:
    return shape[0] * shape[1] if len(shape) == 3 else shape[0]
