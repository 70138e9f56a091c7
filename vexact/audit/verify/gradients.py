"""Part (c): the training side's gradients against a stock transformers model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vexact.audit.verify.sides import TrainingSide, hf_logits
from vexact.training.batches.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.types import Sample

GRADIENT_SEQUENCES = 4
"""Few sequences suffice: every parameter gets a gradient from each."""


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
        (-_plain_logprobs(hf_logits(hf, batch), batch).sum() / count).backward()
    theirs = {name: parameter.grad for name, parameter in hf.named_parameters()}
    result = compare_named(dict(side.gradients()), theirs)
    side.zero_grad()
    hf.zero_grad(set_to_none=True)
    return result


def _plain_logprobs(logits: Tensor, batch: PackedBatch) -> Tensor:
    """(R,) in fp64, since torch's fp32 log-softmax on the CPU costs gradients two digits."""
    return logits.double().log_softmax(-1).gather(1, batch.targets.token_ids[:, None])[:, 0]


def compare_named(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Gradients:
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
