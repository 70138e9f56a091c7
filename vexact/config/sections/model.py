"""`actor_rollout_ref.model.*`: the checkpoint both sides load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vexact.config.fields import ConfigError, opt


@dataclass(frozen=True)
class ModelSection:
    path: str = opt(
        "", "Directory of a Hugging Face checkpoint (config.json, safetensors, tokenizer). Required.", verl="~/models/…"
    )
    tokenizer_path: str | None = opt(None, "Tokenizer directory; null takes the model's.")
    custom_chat_template: str | None = opt(
        None, "Jinja chat template to use instead of the tokenizer's: its text, or a file that holds it."
    )
    enable_gradient_checkpointing: bool = opt(
        True, "Recompute activations in the backward pass: less memory, same bits."
    )
    recompute_num_layers: int | Literal["auto"] | None = opt(
        "auto",
        "Layers whose activations are recomputed, the first ones; the others keep theirs, which is faster. Never "
        "changes results. auto: as few as fit, by the memory plan. null: all.",
        ge=0,
    )

    def recomputed_of(self, num_layers: int) -> int:
        """How many of a model's layers are recomputed; while "auto" is not settled, the most that it may be."""
        given = num_layers - 1 if self.recompute_num_layers == "auto" else self.recompute_num_layers
        return recomputed_layers(self.enable_gradient_checkpointing, given, num_layers)


def recomputed_layers(enabled: bool, given: int | None, num_layers: int) -> int:
    """The first so many of ``num_layers``: ``given``, or all of them where it is None; none where not ``enabled``.

    Raises:
        ConfigError: the model has not so many layers.
    """
    if not enabled:
        return 0
    if given is None:
        return num_layers
    if not 0 <= given <= num_layers:
        raise ConfigError(
            f"actor_rollout_ref.model.recompute_num_layers={given}, but the model has {num_layers} layers; set a "
            "number of them, or null for all"
        )
    return given
