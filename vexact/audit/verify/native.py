"""Parts (b) and (c): how close the training side is to a stock transformers model, forward and backward.

Closeness, not equality: torch's own kernels round in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vexact.audit.verify.sides import TrainingSide
from vexact.training.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.types import Sample

TOP_K = 10
GRADIENT_SEQUENCES = 4
"""Few sequences suffice for (c): every parameter gets a gradient from each."""


@dataclass(slots=True)
class Closeness:
    """Logits of every response position against transformers'."""

    positions: int = 0
    argmax_equal: int = 0
    argmax_tied: int = 0  # the argmax differs, but transformers gives both tokens the same (rounded) logit
    top_k_overlap: float = 0.0  # mean share of the TOP_K tokens that both have
    max_abs_diff: float = 0.0
    mean_abs_diff: float = 0.0

    @property
    def argmax_agreement(self) -> float:
        """Share of positions where the argmax is equal; a tie in transformers' rounded logits has no right answer."""
        return (self.argmax_equal + self.argmax_tied) / max(1, self.positions)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of the mean log-probability of the responses against transformers'."""

    parameters: int
    non_finite: list[str]
    zero: list[str]
    min_cosine: float
    min_cosine_parameter: str
    cosine: float  # of all gradients as one vector
    relative_norm: float  # norm of the gradient over the norm of transformers'

    @property
    def usable(self) -> bool:
        """Finite and non-zero for every parameter."""
        return not (self.non_finite or self.zero)


@dataclass(frozen=True, slots=True)
class Native:
    """Parts (b) and (c) together."""

    closeness: Closeness
    gradients: Gradients


def compare_native(side: TrainingSide, hf: Any, samples: Sequence[Sample], fused: bool, device: torch.device) -> Native:
    """Logits and gradients of ``side`` against those of a stock transformers model."""
    return Native(compare_logits(side, hf, samples, device), compare_gradients(side, hf, samples, fused, device))


@torch.no_grad()
def compare_logits(side: TrainingSide, hf: Any, samples: Sequence[Sample], device: torch.device) -> Closeness:
    """Every response position of every sample; transformers sees one unpadded sequence at a time."""
    result = Closeness()
    total_diff = total_overlap = 0.0
    for sample in samples:
        batch = pack_tokens([TokenSequence(sample.prompt_token_ids, sample.token_ids)], device)
        ours, theirs = side.logits(batch), _hf_logits(hf, batch)  # (R, V)
        diff = (ours - theirs).abs()
        a, b = ours.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)
        equal = (a == b).flatten()
        tied = (theirs.gather(1, a) == theirs.gather(1, b)).flatten() & ~equal
        result.positions += len(equal)
        result.argmax_equal += int(equal.sum())
        result.argmax_tied += int(tied.sum())
        result.max_abs_diff = max(result.max_abs_diff, float(diff.max()))
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


def _hf_logits(hf: Any, batch: PackedBatch) -> Tensor:
    """(R, V) fp32 of a batch that holds one sequence."""
    return hf(input_ids=batch.input_ids[None], use_cache=False).logits[0].index_select(0, batch.targets.rows).float()


def compare_gradients(
    side: TrainingSide, hf: Any, samples: Sequence[Sample], fused: bool, device: torch.device
) -> Gradients:
    """Backward of the mean log-probability through both sides, parameter by parameter."""
    sequences = [TokenSequence(s.prompt_token_ids, s.token_ids) for s in samples[:GRADIENT_SEQUENCES]]
    count = sum(len(s.response) for s in sequences)
    side.zero_grad()
    batch = pack_tokens(sequences, device)
    logprobs = side.logprobs(batch) if fused else _plain_logprobs(side.logits(batch), batch)
    (-logprobs.sum() / count).backward()
    hf.zero_grad(set_to_none=True)
    for sequence in sequences:
        batch = pack_tokens([sequence], device)
        (-_plain_logprobs(_hf_logits(hf, batch), batch).sum() / count).backward()
    theirs = {name: parameter.grad for name, parameter in hf.named_parameters()}
    result = _compare(dict(side.gradients()), theirs)
    side.zero_grad()
    hf.zero_grad(set_to_none=True)
    return result


def _plain_logprobs(logits: Tensor, batch: PackedBatch) -> Tensor:
    """(R,) in fp64, since torch's fp32 log-softmax on the CPU costs gradients two digits."""
    return logits.double().log_softmax(-1).gather(1, batch.targets.token_ids[:, None])[:, 0]


def _compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Gradients:
    """Raises ValueError when the two sides do not have the same parameters."""
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(f"training side and transformers have different parameters, among them {odd[0]}")
    non_finite, zero, cosines = [], [], {}
    dot = our_square = their_square = 0.0
    for name, gradient in ours.items():
        a, b = gradient.detach().double().flatten(), theirs[name].double().flatten()
        if not bool(a.isfinite().all()):
            non_finite.append(name)
        elif not bool(a.any()):
            zero.append(name)
        products = float(a @ b), float(a @ a), float(b @ b)
        cosines[name] = _cosine(*products)
        dot, our_square, their_square = dot + products[0], our_square + products[1], their_square + products[2]
    worst = min(cosines, key=lambda name: cosines[name] if cosines[name] == cosines[name] else -2.0)
    ratio = (our_square / their_square) ** 0.5 if their_square else float("nan")
    cosine = _cosine(dot, our_square, their_square)
    return Gradients(len(ours), non_finite, zero, cosines[worst], worst, cosine, ratio)


def _cosine(dot: float, square_a: float, square_b: float) -> float:
    """0 against a zero vector: nothing agrees with nothing."""
    norms = (square_a * square_b) ** 0.5
    return dot / norms if norms else 0.0
