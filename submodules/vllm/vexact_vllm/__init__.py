"""vLLM as a rollout of vexact's trainer, ``actor_rollout_ref.rollout.name=vllm``: a baseline that is not exact.

This is the ``RolloutPlugin`` of the entry point; vLLM itself is imported by ``build``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vexact.config import Config
from vexact_vllm.settings import check

if TYPE_CHECKING:
    from vexact_vllm.rollout import VllmRollout

__all__ = ["build", "check"]


def build(config: Config, tokenizer: Any, device: torch.device) -> VllmRollout:
    """Loads ``config.model.path`` in this process. Raises ValueError: what the user has to fix, named."""
    check(config)
    from vexact_vllm.rollout import VllmRollout

    return VllmRollout(config, tokenizer, device)
