"""A failed comparison explained in the process whose engine generated the sample, whoever trained on it."""

from __future__ import annotations

from collections.abc import Container
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vexact.audit.compare import TokenDifference
from vexact.audit.explain import explain
from vexact.audit.explain.operators import Operators, copy_operators, restore_operators
from vexact.models import CausalLM
from vexact.models.load import model_of
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor
from vexact.training.state.past_weights import PastWeights
from vexact.types import Sample

TIMEOUT_S = 600.0
"""What a diagnosis may take: all weights travel to one process, and one request is computed a few times."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be explained, and by whom."""

    sample: Sample
    sampling: SamplingParams
    observed: TokenDifference | None
    generated_by: int  # the rank whose engine explains it
    trained_by: int  # the rank that computed its log-probabilities
    past_version: int | None  # of the weights that generated it, when the actor has newer ones
    operators: Operators  # of the rank that trained on it
    replay_file: Path
    model_path: str


def give_weights(
    question: Question, actor: Actor, past: PastWeights, rank: int, trainers: Container[int]
) -> dict[str, Tensor]:
    """The trainer's whole weights in the compute dtype, on the host of the rank that explains; nothing elsewhere.

    All ranks that train call it together. A rank that explains and is not among the ``trainers`` calls
    ``take_weights`` meanwhile.
    """
    version = question.past_version
    weights: dict[str, Tensor] = {}
    with actor.resident(), nullcontext() if version is None else past.in_place(version):
        for name, tensor in actor.named_weights():
            if rank == question.generated_by:
                weights[name] = tensor.detach().to("cpu", copy=True)
            elif rank == question.trained_by and question.generated_by not in trainers:
                dist.send(_bytes(tensor.detach().cpu()), question.generated_by)
    return weights


def take_weights(question: Question, model: CausalLM) -> dict[str, Tensor]:
    """What the trainer sends of a model like ``model``."""
    weights = {name: torch.empty_like(p, device="cpu") for name, p in model.named_parameters()}
    for tensor in weights.values():
        dist.recv(_bytes(tensor), question.trained_by)
    return weights


def explain_here(question: Question, weights: dict[str, Tensor], engine: Engine, actor: Actor | None) -> str:
    """The first divergence as text; writes the replay file.

    Args:
        weights: the trainer's, whole.
        engine: this rank's; it gets earlier weights if the question is about them.
        actor: this rank's, if it trains.
    """
    sample, notes = question.sample, []
    engine.resume_kv_cache()
    if question.past_version is not None:
        notes.append(f"the engine had gone on to weights version {engine.weights_version} and was given these again")
        engine.update_weights(weights.items(), question.past_version)
    model = model_of(engine.model.config, weights, engine.model.lm_head_weight.device)
    if actor is not None and question.trained_by == question.generated_by:
        copy_operators(actor.model, model)
    else:
        lost = restore_operators(model, question.operators)
        notes += [f"the trainer's operator {name} is unknown here; the invariant one ran" for name in lost]
    question.replay_file.parent.mkdir(parents=True, exist_ok=True)
    found = explain(
        engine,
        model,
        sample,
        question.replay_file,
        sampling_params=question.sampling,
        observed=question.observed,
        model_path=question.model_path,
    )
    return "\n".join([found.describe(), *(f"  note     {note}" for note in notes)])


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes, which every transport knows."""
    return tensor.contiguous().view(-1).view(torch.uint8)
