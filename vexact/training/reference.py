"""The frozen policy that a KL term compares with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from vexact.models import CausalLM
from vexact.training.batches.batch import token_sequence
from vexact.training.config import ActorConfig
from vexact.training.optim.offload import park
from vexact.training.parallel.ranks import Ranks
from vexact.training.parallel.sharding import prepare
from vexact.training.passes.forward import Scored, fingerprint, join, score
from vexact.types import TrainSequence


class Reference:
    """Log-probabilities under fixed weights, through the very forward that trains.

    While the actor still has the reference's weights every KL estimate is therefore exactly zero.
    """

    def __init__(
        self,
        model: CausalLM,
        config: ActorConfig,
        device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Freezes ``model`` in place.

        Of ``config`` only dtype, fsdp, param_offload, ppo_max_token_len_per_gpu, ulysses_sequence_parallel_size and
        expert_parallel_size are read. ``group`` is as for ``Actor``.
        """
        self.config, self.model = config, model.requires_grad_(False)
        where = torch.device(device) if device is not None else model.lm_head_weight.device
        self.ranks = Ranks.of_process(where, group).sharing(config.ulysses_sequence_parallel_size, model.config)
        prepare(model, self.ranks, config.torch_dtype, config.fsdp, config.expert_parallel_size)
        self._parked = park(model, config.param_offload)

    def score(self, sequences: Sequence[TrainSequence]) -> Scored:
        """This rank's share of ``logprobs``. All ranks call it together, with the same sequences."""
        names = [s.sample.request_id for s in sequences]
        tokens = [token_sequence(s) for s in sequences]
        self.ranks.require_equal("sequences", fingerprint(tokens, names))
        with self._parked.resident():
            return score(self.model, tokens, names, self.config.max_micro_batch_tokens, self.ranks)

    def logprobs(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """Per sequence (R,) fp32, on every rank. All ranks call it together, with the same sequences."""
        return join(self.score(sequences), [len(s.sample.token_ids) for s in sequences], self.ranks).logprobs
