"""Log-probabilities of a prompt's own tokens, by the training forward."""

from __future__ import annotations

import numpy as np
import torch

from vexact.models.decoder import CausalLM, Targets
from vexact.ops.attention import PackedMetadata
from vexact.rollout.engine_config import EngineConfig


class PromptScorer:
    """Computes a prompt without the cache, as the trainer packs it, so that its bits are the trainer's."""

    def __init__(self, model: CausalLM, config: EngineConfig) -> None:
        self._model, self._config = model, config

    def check(self, request_id: str, num_prompt_tokens: int) -> None:
        """Raises ValueError for a prompt that is not to be computed in one pass, or not by the trainer's operators."""
        if not self._config.batch_invariant:
            raise ValueError(
                f"request {request_id!r}: prompt_logprobs needs an engine with batch_invariant=True; stock operators "
                "decode only"
            )
        if self._config.mismatch_mode != "none":
            raise ValueError(
                f"request {request_id!r}: prompt_logprobs are the trainer's, and mismatch_mode="
                f"{self._config.mismatch_mode} has this engine compute others; use 'none'"
            )
        most = self._config.max_num_batched_tokens
        if num_prompt_tokens > most:
            raise ValueError(
                f"request {request_id!r}: prompt_logprobs computes {num_prompt_tokens} prompt tokens in one pass, more "
                f"than max_num_batched_tokens={most}; raise that or shorten the prompt"
            )

    @torch.no_grad()
    def score(self, token_ids: np.ndarray) -> np.ndarray:
        """(P,) int64 -> (P - 1,) fp32: of every token but the first, given those before it, at temperature 1."""
        count = len(token_ids) - 1
        if not count:
            return np.empty(0, np.float32)
        device = self._model.lm_head_weight.device
        ids, rows = torch.from_numpy(token_ids).to(device), torch.arange(count, device=device)
        targets = Targets(
            rows=rows,
            token_ids=ids[1:],
            inv_temperature=torch.ones(count, device=device),
            min_logit=torch.full((count,), -torch.inf, device=device),
        )
        scores = self._model(ids[:-1], rows, PackedMetadata.from_lengths([count], device), targets=targets)
        logprobs: np.ndarray = scores.logprobs.cpu().numpy()
        return logprobs


class PromptLogprobs:
    """Those of one prompt, computed when the first of its samples has ended."""

    def __init__(self, scorer: PromptScorer, token_ids: np.ndarray) -> None:
        self._scorer, self._token_ids = scorer, token_ids
        self._values: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """(P - 1,) fp32."""
        if self._values is None:
            self._values = self._scorer.score(self._token_ids)
        return self._values
