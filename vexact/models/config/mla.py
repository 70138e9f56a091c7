"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): its widths and its scale."""

from __future__ import annotations

from dataclasses import dataclass

from vexact.models.config.fields import Fields
from vexact.models.config.rope import RopeConfig

_MOST_WIDTH = 1 << 20
MLA_KEYS = frozenset((
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim",
    "rope_interleave",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class MlaConfig:
    """Keys and values are expanded from one latent vector a token; one slice, the same in all heads' keys, rotates."""

    q_rank: int | None  # width of the queries' latent vector; None where they are projected directly
    kv_rank: int
    nope_dim: int  # of a head's query and key, not rotated
    rope_dim: int  # of a head's query and key, rotated
    value_dim: int
    interleaved: bool  # whether neighbours are rotated together, rather than the two halves
    softmax_scale: float

    @property
    def key_dim(self) -> int:
        return self.nope_dim + self.rope_dim


def read_mla(config: Fields, rope: RopeConfig, heads: int, v3: bool) -> MlaConfig:
    """
    Raises:
        ValueError: a value out of range, or keys that do not fit together.
    """
    if config.values.get("num_key_value_heads") is not None and config.size("num_key_value_heads", heads) != heads:
        config.refuse("num_key_value_heads", f"must be num_attention_heads, {heads}: every head has its own keys")
    nope, rotated = config.size("qk_nope_head_dim", _MOST_WIDTH), config.size("qk_rope_head_dim", _MOST_WIDTH)
    if rotated % 2:
        config.refuse("qk_rope_head_dim", "must be even for rotary embedding")
    if config.values.get("qk_head_dim", nope + rotated) != nope + rotated:
        config.refuse("qk_head_dim", f"must be qk_nope_head_dim + qk_rope_head_dim, {nope + rotated}, or absent")
    # transformers makes the angles of version 3 of it: with 2, say, all pairs would turn alike
    if v3 and config.values.get("head_dim") is not None and config.values["head_dim"] not in (rotated, nope + rotated):
        config.refuse(
            "head_dim", f"must be qk_rope_head_dim, {rotated}, or absent: heads have widths of their own here"
        )
    interleaved = config.flag("rope_interleave", True)
    if not (interleaved or v3):
        config.refuse("rope_interleave", "is not what DeepseekV2ForCausalLM computes; it must be true or absent")
    latent = config.values.get("q_lora_rank") is not None
    return MlaConfig(
        q_rank=config.size("q_lora_rank", _MOST_WIDTH) if latent else None,
        kv_rank=config.size("kv_lora_rank", _MOST_WIDTH),
        nope_dim=nope,
        rope_dim=rotated,
        value_dim=config.size("v_head_dim", _MOST_WIDTH),
        interleaved=interleaved,
        softmax_scale=_softmax_scale(nope + rotated, rope),
    )


def _softmax_scale(key_dim: int, rope: RopeConfig) -> float:
    """Where the context is stretched, DeepSeek sharpens the softmax by a factor of its own."""
    return key_dim**-0.5 * rope.softmax_factor**2
