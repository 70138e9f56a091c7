"""`actor_rollout_ref.model.*`: the checkpoint both sides load."""

from __future__ import annotations

from dataclasses import dataclass

from vexact.config.fields import opt


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
