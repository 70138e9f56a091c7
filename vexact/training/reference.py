"""The frozen policy that a KL term compares with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vexact.models import CausalLM
from vexact.training.batch import token_sequence
from vexact.training.config import ActorConfig
from vexact.training.forward import prepare, score
from vexact.training.ranks import Ranks
from vexact.types import TrainSequence


class Reference:
    """Log-probabilities under fixed weights, through the very forward that trains.

    While the actor still has the reference's weights every KL estimate is therefore exactly zero.
    """

    def __init__(self, model: CausalLM, config: ActorConfig, device: torch.device | str | None = None) -> None:
        """Freezes ``model`` in place.

        Of ``config`` only dtype, fsdp, ppo_max_token_len_per_gpu and ulysses_sequence_parallel_size are read.
        """
        self.config, self.model = config, model.requires_grad_(False)
        ranks = Ranks.of_process(torch.device(device) if device is not None else model.lm_head_weight.device)
        self.ranks = ranks.sharing(config.ulysses_sequence_parallel_size, model.config)
        prepare(model, self.ranks, config.torch_dtype, config.fsdp)

    def logprobs(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """Per sequence (R,) fp32. All ranks call it together."""
        names = [s.sample.request_id for s in sequences]
        tokens = [token_sequence(s) for s in sequences]
        return score(self.model, tokens, names, self.config.max_micro_batch_tokens, self.ranks)
