"""Hidden states of the sampled rows to tokens, log-probabilities and truncation thresholds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vexact.models.nonfinite import NonFiniteError
from vexact.ops.sampling import SamplingTensors, sample
from vexact.types import Sample


class StepOutput(NamedTuple):
    """What one step sampled, on the host, in the order of ``Batch.sample_rows``."""

    token_ids: np.ndarray  # (S,) int64
    logprobs: np.ndarray  # (S,) float32
    min_logits: np.ndarray  # (S,) float32
    route_digests: np.ndarray | None = None  # (S,) int64, where there are experts

    def finite(self) -> np.ndarray:
        """(S,) bool: rows whose log-probability is a number and whose threshold is one or -inf, which keeps all."""
        return np.isfinite(self.logprobs) & (self.min_logits < np.inf)

    def rows(self, chosen: np.ndarray) -> StepOutput:
        """Some rows, by mask (S,) bool."""
        digests = None if self.route_digests is None else self.route_digests[chosen]
        return StepOutput(self.token_ids[chosen], self.logprobs[chosen], self.min_logits[chosen], digests)

    def describe_nonfinite(self, request_id: str, position: int) -> str:
        """What to say of rows that are not ``finite``: ``request_id`` and ``position`` are those of the first."""
        values = f"log-probability {self.logprobs[0]}"
        if not self.min_logits[0] < np.inf:
            values += f" and threshold {self.min_logits[0]}"
        others = len(self.token_ids) - 1
        more = f" (and {others} more requests of this step)" if others else ""
        return (
            f"request {request_id}, response position {position}: token {self.token_ids[0]} was sampled with "
            f"{values}{more}. "
        )


class NonFiniteLogprobError(NonFiniteError):
    """A request sampled a token whose log-probability, or threshold, is NaN or infinite: nothing to train on.

    The requests concerned have left the engine; all others are as they would be without them.
    """

    def __init__(self, message: str, request_ids: list[str], samples: list[Sample]) -> None:
        super().__init__(message)
        self.request_ids = request_ids
        self.samples = samples  # that ended well: in this step or, from ``generate``, in this call


def sample_tokens(logits: Tensor, params: SamplingTensors, route_digests: Tensor | None = None) -> Tensor:
    """Sample a token per row of ``logits`` (S, V) fp32.

    Returns (3, S) int32: token ids, then the bits of the fp32 log-probabilities and of the fp32 thresholds, so that one
    copy brings all three to the host. With ``route_digests`` (S,) int64 (5, S), the last two those of the digests.
    """
    sampled = sample(logits, params)
    columns = [
        sampled.token_ids.to(torch.int32),
        sampled.logprobs.view(torch.int32),
        sampled.min_logit.view(torch.int32),
    ]
    if route_digests is not None:
        columns += route_digests.view(torch.int32).view(-1, 2).unbind(1)
    return torch.stack(columns)


def to_host(packed: Tensor) -> StepOutput:
    """Wait for the device and unpack the result of ``sample_tokens``."""
    return unpacked(packed.cpu().numpy())


def unpacked(host: np.ndarray) -> StepOutput:
    """The result of ``sample_tokens``, or some columns of it, once it is on the host. Shares its memory."""
    digests = None if len(host) == 3 else np.ascontiguousarray(host[3:].T).view(np.int64).squeeze(1)
    return StepOutput(host[0].astype(np.int64), host[1].view(np.float32), host[2].view(np.float32), digests)
