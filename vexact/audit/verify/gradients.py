"""Part (c): the training side's gradients against a stock transformers model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vexact.audit.verify.routes import RouteTap, layer_of
from vexact.audit.verify.sides import TrainingSide, hf_logits
from vexact.training.batches.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.types import Sample

GRADIENT_SEQUENCES = 4
"""Few sequences suffice: every parameter gets a gradient from each."""

_ROUNDING = 1e-6  # of the largest gradient: all that fp32 leaves of one that is zero


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
    experts: int = 0  # of all layers
    idle_experts: int = 0  # which no token chose
    stray: list[str] = field(default_factory=list)  # idle experts that have a gradient all the same
    without_effect: list[str] = field(default_factory=list)  # zero here, and there but for rounding

    @property
    def usable(self) -> bool:
        """Finite, and non-zero for every parameter but experts that no token chose, and what decides nothing, as the
        router of a single expert does; theirs is zero."""
        return not (self.non_finite or self.zero or self.stray)


def compare_gradients(
    side: TrainingSide, hf: Any, samples: Sequence[Sample], fused: bool, device: torch.device
) -> Gradients:
    """Backward of the mean log-probability through both sides, parameter by parameter."""
    sequences = [TokenSequence(s.prompt_token_ids, s.token_ids) for s in samples[:GRADIENT_SEQUENCES]]
    count = sum(len(s.response) for s in sequences)
    side.zero_grad()
    tap: RouteTap | None = getattr(side, "routes", None)
    if tap is not None:
        tap.forget()
    batch = pack_tokens(sequences, device)
    logprobs = side.logprobs(batch) if fused else _plain_logprobs(side.logits(batch), batch)
    (-logprobs.sum() / count).backward()
    hf.zero_grad(set_to_none=True)
    for sequence in sequences:
        batch = pack_tokens([sequence], device)
        (-_plain_logprobs(hf_logits(hf, batch), batch).sum() / count).backward()
    theirs = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in hf.named_parameters()
    }
    result = compare_named(dict(side.gradients()), theirs, {} if tap is None else tap.loads)
    side.zero_grad()
    hf.zero_grad(set_to_none=True)
    return result


def _plain_logprobs(logits: Tensor, batch: PackedBatch) -> Tensor:
    """(R,) in fp64, since torch's fp32 log-softmax on the CPU costs gradients two digits."""
    return logits.double().log_softmax(-1).gather(1, batch.targets.token_ids[:, None])[:, 0]


def compare_named(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], loads: Mapping[int, Tensor] | None = None
) -> Gradients:
    """Raises ValueError when the two sides do not have the same parameters.

    ``loads``: by layer, (E,) how many tokens each expert had.
    """
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(f"training side and transformers have different parameters, among them {odd[0]}")
    non_finite, zero, stray, without_effect, cosines = [], [], [], [], {}
    rounding = _ROUNDING * max(float(gradient.detach().abs().max()) for gradient in theirs.values())
    dot = our_square = their_square = 0.0
    experts = idle = 0
    for name, gradient in ours.items():
        a, b = gradient.detach().double().flatten(), theirs[name].double().flatten()
        if not bool(a.isfinite().all()):
            non_finite.append(name)
        elif not bool(a.any()):
            if rounding and bool(b.abs().max() <= rounding):
                without_effect.append(name)
                continue
            zero.append(name)
        elif ".experts." in name and loads:
            chosen = loads[layer_of(name)] > 0
            missing, surplus = _odd_experts(gradient, theirs[name], chosen)
            zero += [f"{name}[{i}]" for i in missing]
            stray += [f"{name}[{i}]" for i in surplus]
            if name.endswith(".down_proj"):  # an expert has several tensors
                experts, idle = experts + len(chosen), idle + int((~chosen).sum())
        products = float(a @ b), float(a @ a), float(b @ b)
        cosines[name] = _cosine(*products)
        dot, our_square, their_square = dot + products[0], our_square + products[1], their_square + products[2]
    worst = min(cosines, key=lambda name: cosines[name] if cosines[name] == cosines[name] else -2.0)
    ratio = (our_square / their_square) ** 0.5 if their_square else float("nan")
    cosine = _cosine(dot, our_square, their_square)
    return Gradients(
        len(ours),
        non_finite,
        zero,
        cosines[worst],
        worst,
        cosine,
        ratio,
        experts=experts,
        idle_experts=idle,
        stray=stray,
        without_effect=without_effect,
    )


def _odd_experts(ours: Tensor, theirs: Tensor, chosen: Tensor) -> tuple[list[int], list[int]]:
    """Of gradients (E, ...): experts that had tokens and got nothing, though transformers' did, and the reverse of it.

    A token of the last layer that predicts no response has no gradient, so its experts may get nothing.
    """
    some, expected = (x.detach().flatten(1).any(1) for x in (ours, theirs))
    missing, stray = chosen & expected & ~some, ~chosen.to(some.device) & some
    return missing.nonzero().flatten().tolist(), stray.nonzero().flatten().tolist()


def _cosine(dot: float, square_a: float, square_b: float) -> float:
    """0 against a zero vector: nothing agrees with nothing."""
    norms = (square_a * square_b) ** 0.5
    return dot / norms if norms else 0.0
