"""Part (b): the training side's logits against a stock transformers model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vexact import interrupt
from vexact.audit.compare import larger_gap
from vexact.audit.verify.argmax import argmax_agreement
from vexact.audit.verify.sides import TrainingSide, hf_logits
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.types import Sample

TOP_K = 10


@dataclass(slots=True)
class Closeness:
    """Logits of every response position against transformers'. :mod:`.argmax` defines the three counts."""

    positions: int = 0
    argmax_equal: int = 0
    argmax_tied: int = 0  # another argmax, but transformers gives both tokens the same logit
    argmax_adjacent: int = 0  # another argmax, but transformers' two logits are one unit of the dtype apart, or less
    top_k_overlap: float = 0.0  # mean share of the TOP_K tokens that both have
    max_abs_diff: float = 0.0
    mean_abs_diff: float = 0.0

    @property
    def argmax_with_ties(self) -> int:
        return self.argmax_equal + self.argmax_tied

    @property
    def argmax_with_adjacent(self) -> int:
        return self.argmax_with_ties + self.argmax_adjacent

    @property
    def argmax_agreement(self) -> float:
        """Share of positions whose argmax is equal, or one that the dtype cannot tell from it: all three counts."""
        return self.argmax_with_adjacent / max(1, self.positions)


@torch.no_grad()
def compare_logits(
    side: TrainingSide, hf: Any, samples: Sequence[Sample], dtype: torch.dtype, device: torch.device
) -> Closeness:
    """Every response position of every sample; transformers sees one unpadded sequence at a time.

    ``dtype`` is the one of ``side``, whatever that of ``hf``.
    """
    result = Closeness()
    total_diff = total_overlap = 0.0
    for sample in samples:
        interrupt.check()
        batch = pack_tokens([TokenSequence(sample.prompt_token_ids, sample.token_ids)], device)
        ours, theirs = side.logits(batch), hf_logits(hf, batch)  # (R, V)
        diff = (ours - theirs).abs()
        agreement = argmax_agreement(ours, theirs, dtype)
        result.positions += len(ours)
        result.argmax_equal += int(agreement.equal.sum())
        result.argmax_tied += int(agreement.tied.sum())
        result.argmax_adjacent += int(agreement.adjacent.sum())
        result.max_abs_diff = larger_gap(result.max_abs_diff, float(diff.max()))
        total_diff += float(diff.mean(dim=1).sum())
        total_overlap += _overlap(ours, theirs)
    result.mean_abs_diff = total_diff / max(1, result.positions)
    result.top_k_overlap = total_overlap / max(1, result.positions)
    return result


def _overlap(ours: Tensor, theirs: Tensor) -> float:
    """Sum over rows of the share of top tokens in common; both (R, V)."""
    k = min(TOP_K, ours.shape[1])
    a, b = ours.topk(k).indices, theirs.topk(k).indices  # (R, k)
    return float((a.unsqueeze(2) == b.unsqueeze(1)).any(2).float().mean(1).sum())
