"""A rollout of models that our engine does not define: the converted transformers model with its own key cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vexact import interrupt
from vexact.audit.verify.routes import RouteTap
from vexact.ops import SamplingTensors, sample
from vexact.rollout import SamplingParams
from vexact.rollout.requests.request import draw_settings
from vexact.types import Sample


class CacheRollout:
    """What verify asks of an engine. One request after another: the prompt in pieces, then token by token."""

    def __init__(self, model: Any, routes: RouteTap, *, seed: int, max_num_batched_tokens: int, **_: Any) -> None:
        """
        Args:
            model: of transformers, after ``make_invariant``.
            routes: of this model.
            max_num_batched_tokens: the longest piece of a prompt; an engine's other settings have no meaning here.
        """
        self.model, self.routes, self.seed, self.longest_piece = model, routes, seed, max_num_batched_tokens
        self.device = next(model.parameters()).device
        self._observer: Callable[[Tensor, SamplingTensors], None] | None = None

    def observe_logits(self, observer: Callable[[Tensor, SamplingTensors], None] | None) -> None:
        self._observer = observer

    def stats(self) -> dict[str, float]:
        return {"rollout/preemptions": 0.0, "rollout/prefix_hit_ratio": 0.0}

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], request_ids: Sequence[str]
    ) -> list[Sample]:
        """Of every request ``max_tokens`` tokens, whatever they are."""
        return [self._one(*request) for request in zip(prompts, params, request_ids, strict=True)]

    def _one(self, prompt: Sequence[int], params: SamplingParams, request_id: str) -> Sample:
        settings = draw_settings(params, self.seed, request_id)
        tokens: list[int] = []
        drawn: list[Tensor] = []
        digests: list[Tensor] = []
        cache: Any = None
        pieces = torch.tensor(prompt, device=self.device).split(self.longest_piece)
        while len(tokens) < params.max_tokens:
            interrupt.check()
            for piece in pieces:
                out = self.model(input_ids=piece[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
            logits = out.logits[0].float()
            sampling = SamplingTensors(
                temperature=torch.tensor([settings.temperature], dtype=torch.float32, device=self.device),
                top_k=torch.tensor([settings.top_k], dtype=torch.int32, device=self.device),
                top_p=torch.tensor([settings.top_p], dtype=torch.float32, device=self.device),
                min_p=torch.tensor([settings.min_p], dtype=torch.float32, device=self.device),
                seed=torch.tensor([settings.seed], device=self.device),
                position=torch.tensor([len(prompt) + len(tokens)], device=self.device),
            )
            if self._observer is not None:
                self._observer(logits, sampling)
            token, logprob, min_logit = sample(logits, sampling)
            tokens.append(int(token))
            drawn.append(torch.stack((logprob, min_logit)))
            if self.routes.digests is not None:
                digests.append(self.routes.digests[-1])
            pieces = (token,)
        logprobs, min_logits = torch.cat(drawn, dim=1).cpu().numpy()
        return Sample(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            token_ids=tuple(tokens),
            logprobs=logprobs,
            min_logits=min_logits,
            temperature=float(np.float32(params.temperature)),
            finish_reason="length",
            weights_version=0,
            route_digests=torch.stack(digests).cpu().numpy() if digests else None,
        )
