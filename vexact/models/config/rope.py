"""Rotary embedding: ``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` of before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vexact.models.config.fields import Fields

DEFAULT_THETA = 10000.0  # transformers' own, for most architectures
MOST_POSITIONS = 1 << 24  # angles are computed in float32, which counts that far without a gap

# What belongs to the scaling of each type; what is unknown, or another type's, would change the angles
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
_COMMON = ("rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "finetuned")
_OUTER = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")  # keys of config.json itself
_SPELLINGS = {"type": "rope_type"}  # old name to new
ROPE_TYPES = tuple(_KEYS)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; fields other than ``type`` and ``theta`` belong to the scaling of that type."""

    type: str = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0  # rotations within the original context from which a frequency is kept
    beta_slow: float = 1.0  # and up to which it is divided by ``factor``
    truncate: bool = True  # the band between begins and ends at whole frequencies
    table_factor: float = 1.0  # of all cosines and sines
    softmax_factor: float = 1.0  # its square multiplies the softmax scale of latent attention


def read_rope(config: Fields, default_theta: float = DEFAULT_THETA) -> RopeConfig:
    """
    Raises:
        ValueError: an unknown type, a value out of range, one missing, or two that contradict each other.
    """
    rope = _merged(config)
    kind = _type(rope)
    _refuse_strangers(config, rope, kind)
    theta = _holder(config, rope, "rope_theta").number("rope_theta", 1.0, 1e30, default_theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = rope.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeConfig(kind, theta, factor)
    if kind == "yarn":
        return _yarn(config, rope, theta, factor)
    low = rope.number("low_freq_factor", 1e-6, 1e6)
    high = rope.number("high_freq_factor", 1e-6, 1e6)
    if low >= high:
        rope.refuse("low_freq_factor", f"must be less than high_freq_factor, which is {high:g}")
    return RopeConfig(kind, theta, factor, low, high, _original_positions(config, rope))


def _yarn(config: Fields, rope: Fields, theta: float, factor: float) -> RopeConfig:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), with DeepSeek's two factors of the logarithm."""
    if theta <= 1:
        _holder(config, rope, "rope_theta").refuse("rope_theta", "must be more than 1 with rope_type yarn")
    fast, slow = (_optional(rope, key, 1e-3, 1e6) or usual for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if slow > fast:
        rope.refuse("beta_slow", f"must be at most beta_fast, which is {fast:g}")
    scale, all_dim = _optional(rope, "mscale", 0.0, 1e3), _optional(rope, "mscale_all_dim", 0.0, 1e3)
    table = _optional(rope, "attention_factor", 1e-6, 1e6)
    if table is None:
        table = _mscale(factor, scale) / _mscale(factor, all_dim) if scale and all_dim else _mscale(factor, 1.0)
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original_max_position_embeddings=_original_positions(config, rope),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", True),
        table_factor=table,
        softmax_factor=_mscale(factor, all_dim) if all_dim else 1.0,
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _optional(rope: Fields, key: str, least: float, most: float) -> float | None:
    """A number, or None where the key is absent or null."""
    return None if rope.values.get(key) is None else rope.number(key, least, most)


def _original_positions(config: Fields, rope: Fields) -> int:
    holder = _holder(config, rope, "original_max_position_embeddings")
    return holder.size("original_max_position_embeddings", MOST_POSITIONS)


def _holder(config: Fields, rope: Fields, key: str) -> Fields:
    """Where the file says ``key``, for the message; both hold the same value."""
    return config if key in config else rope


def _merged(config: Fields) -> Fields:
    """All spellings as one object; where two say something, they must say the same."""
    new, old = config.object("rope_parameters"), config.object("rope_scaling")
    if new.values and old.values:
        _require_same(new, old)
    merged: dict[str, Any] = {}
    outer = {key: config.values[key] for key in _OUTER if key in config}
    for part in (Fields(outer, config.file), old, new):
        for key, value in part.values.items():
            if key in merged and merged[key] != value:
                part.refuse(key, f"contradicts {key}={merged[key]!r} elsewhere in the file; only one can be meant")
            merged[key] = value
    return Fields(merged, config.file, (new if new.values else old).prefix if new.values or old.values else "")


def _require_same(new: Fields, old: Fields) -> None:
    """transformers takes one object whole, not keys of both: a key in only one of them would be lost."""
    spelt = [{_SPELLINGS.get(key, key): value for key, value in part.values.items()} for part in (new, old)]
    for part in (new, old):
        for key in part.values:
            name = _SPELLINGS.get(key, key)
            if any(name not in other or other[name] != spelt[0].get(name) for other in spelt):
                part.refuse(key, "is not the same in rope_parameters and rope_scaling; remove one of the two objects")


def _type(rope: Fields) -> str:
    types = {key: rope.choice(key, ROPE_TYPES) for key in ("rope_type", "type") if key in rope}
    if len(set(types.values())) > 1:
        rope.refuse("type", "contradicts rope_type; only one can be meant")
    return next(iter(types.values()), "default")


def _refuse_strangers(config: Fields, rope: Fields, kind: str) -> None:
    for key, value in rope.values.items():
        if key == "partial_rotary_factor" and value is not None and (value != 1 or isinstance(value, bool)):
            _holder(config, rope, key).refuse(
                key, "is not supported; heads are rotated whole, so it must be 1 or absent"
            )
        strange = key not in (*_COMMON, *_KEYS[kind]) and value is not None
        if strange and not (key == "factor" and value == 1):
            rope.refuse(key, f"does not belong to rope_type {kind}; give the type that is meant, or remove the key")
