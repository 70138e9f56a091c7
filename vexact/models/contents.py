"""Whether a checkpoint holds the tensors of a model: all of them, no others, in shapes and formats that can be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from vexact.models.checkpoint import CheckpointReader, Shape
from vexact.models.checkpoint.files import listed, mention
from vexact.models.config import ModelConfig, RopeConfig
from vexact.models.rotary import frequencies

FORMATS = ("F32", "BF16", "F16")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Frequencies that old Llama checkpoints carry along; they are computed from config.json, and must be those
_LEFTOVER = re.compile(r"model\.(layers\.(?P<layer>\d+)\.self_attn\.)?rotary_emb\.inv_freq")
_ROUNDED, _TINY = 2**-7, 1e-7  # rounding to bfloat16, and that of a small number in float16
_FEED_FORWARD = re.compile(r"model\.layers\.(\d+)\.(mlp|block_sparse_moe)\.")
_ALL_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")  # as a transformers module holds them
_LAYER_KEYS = {"first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers"}
_QUANTISED_PARTS = ("scale", "scales", "zeros", "zero_point", "qweight", "qzeros", "g_idx", "absmax")


def check_contents(reader: CheckpointReader, config: ModelConfig, wanted: Mapping[str, Shape]) -> None:
    """Reads headers only, but for a head that must equal the embedding, and old frequencies those of config.json.

    Args:
        wanted: shapes by Hugging Face name, as config.json implies.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape or format; the message names it and its file.
    """
    extra = {name for name in reader if _is_extra(name, config)}
    if extra:
        mention(
            f"{reader.directory}: {len(extra)} tensors of {config.extra_layers} more layers are not read: they predict "
            "later tokens, which neither training nor rollout does"
        )
    held = [name for name in reader if name not in extra and not _is_leftover(name, config)]
    _check_formats(reader, held)
    surplus = [name for name in held if name not in wanted]
    if missing := [name for name in wanted if name not in reader]:
        raise ValueError(
            f"{reader.directory}: the checkpoint lacks {len(missing)} tensors that {config.architecture} needs: "
            f"{listed(missing)}; {_why_missing(missing, surplus, config)}"
        )
    if config.tie_word_embeddings and HEAD in surplus:
        _check_tied_head(reader)
        surplus.remove(HEAD)
    if surplus:
        raise ValueError(
            f"{reader.file(surplus[0])}: {config.architecture} with this config.json has no use for {len(surplus)} "
            f"tensors of the checkpoint: {listed(surplus)}; {_reason(surplus, config)}"
        )
    for name, shape in wanted.items():
        if reader.shape(name) != shape:
            raise ValueError(
                f"{reader.file(name)}: {name} is {reader.shape(name)}, but config.json implies {shape}; "
                "config.json and weights are of different models"
            )
    for name in set(reader).difference(held, extra):
        _check_frequencies(reader, config, name)


def _is_leftover(name: str, config: ModelConfig) -> bool:
    found = _LEFTOVER.fullmatch(name)
    return found is not None and (found["layer"] is None or int(found["layer"]) < config.num_layers)


def _is_extra(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of the layers behind the last one that config.json speaks of."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and 0 <= int(layer[1]) - config.num_layers < config.extra_layers


def _check_formats(reader: CheckpointReader, names: Iterable[str]) -> None:
    odd = [name for name in names if reader.dtype(name) not in FORMATS]
    if not odd:
        return
    name, kind = odd[0], reader.dtype(odd[0])
    fix = (
        "convert the checkpoint to float32" if kind == "F64" else "it is quantised; use the bf16, fp16 or fp32 original"
    )
    raise ValueError(f"{reader.file(name)}: {name} is stored as {kind} ({len(odd)} such tensors); {fix}")


def _check_tied_head(reader: CheckpointReader) -> None:
    head, embedding = reader.tensor(HEAD), reader.tensor(EMBEDDING)
    if head.dtype != embedding.dtype:
        head, embedding = head.float(), embedding.float()
    bits = torch.int32 if head.dtype == torch.float32 else torch.int16
    if not torch.equal(head.view(bits), embedding.view(bits)):
        raise ValueError(
            f"{reader.file(HEAD)}: {HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings=true; set "
            "it to false if the head is meant, or remove the head"
        )


def _check_frequencies(reader: CheckpointReader, config: ModelConfig, name: str) -> None:
    stored = reader.tensor(name).double()
    plain = RopeConfig(theta=config.rope.theta)  # of old, linear scaling divided the positions
    for rope in (plain, config.rope):
        wanted = frequencies(rope, config.rope_dim).double()
        if stored.shape == wanted.shape and torch.allclose(stored, wanted, rtol=_ROUNDED, atol=_TINY):
            return
    width = "head_dim" if config.mla is None else "qk_rope_head_dim"
    raise ValueError(
        f"{reader.file(name)}: {name} holds other frequencies than config.json implies (rope_theta="
        f"{config.rope.theta:g}, {width}={config.rope_dim}, rope_type {config.rope.type}); correct config.json, or "
        "remove the tensor if config.json is right"
    )


def _why_missing(missing: list[str], surplus: list[str], config: ModelConfig) -> str:
    if missing == [HEAD]:
        return "is tie_word_embeddings=true missing in config.json?"
    if config.moe is not None:
        wanted = {_layer(name): _is_of_experts(name) for name in missing if _FEED_FORWARD.match(name)}
        found = [name for name in surplus if _FEED_FORWARD.match(name)]
        other = next((name for name in found if wanted.get(_layer(name)) not in (None, _is_of_experts(name))), None)
        if other is not None:
            return _wrong_layer(other, config)
        together = next((name for name in surplus if _ALL_EXPERTS.search(name)), None)
        if together is not None:
            return f"it holds {together} and some experts of that layer one by one; keep one form"
    if surplus:
        return f"it holds {len(surplus)} under names without use: {listed(surplus, 3)}; save it under the usual names"
    if config.moe is not None and all(".experts." in name for name in missing):
        count = config.moe.num_experts
        return f"config.json says {count} experts; that number is wrong, or the checkpoint was not copied whole"
    return "config.json is another model's, or the checkpoint was not copied whole"


def _wrong_layer(name: str, config: ModelConfig) -> str:
    what = "no experts" if _is_of_experts(name) else "experts"
    keys = ", ".join(sorted(_LAYER_KEYS & config.raw.keys())) or "its keys about layers"
    return f"config.json says that layer {_layer(name)} has {what}, the checkpoint holds {name}; correct {keys}"


def _layer(name: str) -> str:
    return name.split(".")[2]


def _is_of_experts(name: str) -> bool:
    return any(part in name for part in (".experts.", ".shared_experts.", ".gate."))


def _reason(surplus: list[str], config: ModelConfig) -> str:
    """The likely cause, with the fix."""
    name = surplus[0]
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if any(part in _QUANTISED_PARTS or "_scale" in part for part in name.split(".")):
        return "scales belong to quantised weights; use the bf16, fp16 or fp32 original"
    if "lora_" in name or ".base_layer." in name:
        return "they are of a LoRA adapter; merge it into the model first"
    if layer is not None and int(layer[1]) >= config.num_layers:
        return f"num_hidden_layers={config.num_layers} is too small, or the files are another model's"
    if config.moe is not None and _FEED_FORWARD.match(name):
        if _is_of_experts(name) != (int(_layer(name)) in config.moe.layers):
            return _wrong_layer(name, config)
        if _ALL_EXPERTS.search(name):
            return "the experts of that layer are there twice, in one tensor and one by one; keep one form"
        if ".experts." in name and name.endswith("bias"):
            return f"the experts of {config.architecture} have no biases; use the right architecture"
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert is not None and config.moe is not None and int(expert[1]) >= config.moe.num_experts:
        return f"config.json says {config.moe.num_experts} experts; it is another model's, or that number is wrong"
    if name.endswith(".bias"):
        return "set attention_bias or mlp_bias if the architecture has them, or use the right architecture"
    return "config.json is another model's, or the tensors are not this model's; leaving them out would change it"
