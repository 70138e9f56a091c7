"""New weights into a running vLLM, in place, and the proof that its layers multiply by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vexact.models import ModelConfig
from vexact.models.hf_names import hf_sources, to_hf
from vexact.weights import WeightSyncError

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
_PROBE_ROWS = 256  # unit vectors that go through a layer at a time


def addresses(model: nn.Module) -> dict[str, int]:
    """Where a GPU's parameters are: captured graphs read there."""
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def repack_tied_head(model: nn.Module) -> None:
    """On a CPU vLLM multiplies by packed copies of its weights. A reload packs every layer anew except a head that is
    tied to the embedding: that one keeps the old weights, and nothing says so."""
    head = getattr(model, HEAD, None)
    if head is not None and _on_cpu(model):
        head.quant_method.process_weights_after_loading(head)


def reload(llm: Any, config: ModelConfig, sent: Sequence[tuple[str, Tensor]]) -> None:
    """Replaces all weights in place. ``sent`` are whole tensors under our names."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": to_hf(config, sent)})
    llm.apply_model(repack_tied_head)
    if not llm.reset_prefix_cache():
        raise WeightSyncError("vLLM did not forget its prefix cache, which holds keys and values of older weights")


def prove(model: nn.Module, config: ModelConfig, sent: Sequence[tuple[str, Tensor]], at: dict[str, int]) -> None:
    """Every layer must hold, and multiply by, the values that were sent.

    On a GPU parameters are read where captured graphs read them. On a CPU they are packed away, so every linear layer
    is probed: unit vectors go through it, and a product with one is a column of its weights, without rounding.

    Args:
        at: ``addresses`` when graphs were captured.

    Raises:
        WeightSyncError: values differ or parameters have moved; the layer is named.
    """
    moved = [name for name, address in addresses(model).items() if at.get(name, address) != address]
    if moved and not _on_cpu(model):
        raise WeightSyncError(f"vLLM moved {moved[0]} (and {len(moved) - 1} more): its CUDA graphs read the old memory")
    for name, tensor in sent:
        for module_name in _modules(config, name):
            module = model.get_submodule(module_name)
            for held, expected in _held(module, module_name, name.rsplit(".", 1)[1], tensor):
                _require_equal(module_name, held, expected)


def _modules(config: ModelConfig, name: str) -> list[str]:
    """vLLM's modules that use our parameter ``name``: it fuses the same projections."""
    parent, _, kind = hf_sources(config, name)[0][0].rpartition(".")
    if name.endswith((".qkv_proj." + kind, ".gate_up_proj." + kind)):
        parent = parent.rsplit(".", 1)[0] + "." + name.rsplit(".", 2)[1]
    return [parent, HEAD] if parent == EMBEDDING and config.tie_word_embeddings else [parent]


def _held(module: nn.Module, module_name: str, kind: str, sent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What the module computes with, beside what was sent, part by part."""
    parameter = getattr(module, kind)
    quant_method = getattr(module, "quant_method", None)
    multiplies = quant_method is not None and kind == "weight" and module_name != EMBEDDING
    if not multiplies or parameter.device.type != "cpu":
        yield parameter[: len(sent)], sent  # the vocabulary is padded
        return
    width = sent.shape[1]
    for start in range(0, width, _PROBE_ROWS):
        units = torch.eye(width, dtype=sent.dtype)[start : start + _PROBE_ROWS]
        yield quant_method.apply(module, units, None)[:, : len(sent)], sent[:, start : start + _PROBE_ROWS].T


def _require_equal(module_name: str, held: Tensor, sent: Tensor) -> None:
    if held.shape != sent.shape:
        raise WeightSyncError(
            f"vLLM's {module_name} has weights of shape {tuple(held.shape)}, and was sent {tuple(sent.shape)}: it "
            "reads config.json in another way, so its samples would be another model's"
        )
    expected = sent.to(held.device, held.dtype)
    tiny = torch.finfo(sent.dtype).tiny
    different = (held != expected) & ~((held.abs() < tiny) & (expected.abs() < tiny))  # denormals may count as 0
    if different.any():
        count, gap = int(different.sum()), float((held - expected).abs().max())
        raise WeightSyncError(
            f"vLLM's {module_name} still computes with other weights than it was sent ({count} of {expected.numel()} "
            f"probed values differ, by up to {gap:.3g}); its samples would be an older policy's"
        )


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"
