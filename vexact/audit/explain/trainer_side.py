"""Runs one request through the trainer's packed forward, recording every operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vexact.audit.explain.recorder import Call, Recorder, Site, recording
from vexact.models import CausalLM
from vexact.ops import linear, token_logprobs
from vexact.rollout.execution.weight_memory import GivenBack
from vexact.training import Actor
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores
from vexact.types import Sample
from vexact.weights import checksum

HEAD = Site("lm_head", "linear")
HIDDEN = Site("norm", "add_rms_norm")
_ROWS = 64  # rows of logits at a time


@dataclass(frozen=True, slots=True, eq=False)
class Trainer:
    """The trained model and its whole weights in the dtype it computes in."""

    model: CausalLM
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, source: Actor | CausalLM) -> Trainer:
        """
        Raises:
            ValueError: an actor of several ranks; its forward would need all of them.
        """
        if isinstance(source, Actor):
            if source.ranks.world_size > 1:
                raise ValueError(
                    f"explain() runs on one rank, this actor has {source.ranks.world_size}; replay the written file "
                    "in one process"
                )
            return cls(source.model, dict(source.named_weights()))
        return cls(source, {name: p.detach() for name, p in source.named_parameters()})

    @property
    def head_weight(self) -> Tensor:
        tied = self.model.config.tie_word_embeddings
        return self.weights["embed_tokens.weight" if tied else "lm_head.weight"]


@dataclass(slots=True, eq=False)
class TrainerReplay:
    """Everything the trainer side did for the request."""

    recorder: Recorder
    token_ids: list[int]
    positions: list[int]
    logprobs: np.ndarray  # (R,) fp32 of the fused head, as in training
    shared_logprobs: np.ndarray  # (R,) fp32 of the shared definition on the trainer's logits
    spot_logits: Tensor | None = None  # (V,) fp32 at recorder.keep


@torch.no_grad()
def replay_trainer(trainer: Trainer, sample: Sample, recorder: Recorder) -> TrainerReplay:
    """The forward of training with this request alone in its batch."""
    weight = trainer.head_weight
    sequence = TokenSequence(sample.prompt_token_ids, sample.token_ids, sample.inv_temperature, sample.min_logits)
    batch = pack_tokens([sequence], weight.device)
    recorder.hold = HIDDEN
    recorder.begin(np.arange(sequence.num_input_tokens), "packed")
    with recording(trainer.model, recorder):
        scores = token_scores(trainer.model, batch)
    if isinstance(trainer.model, FSDPModule):
        trainer.model.reshard()  # only a backward does it otherwise, and an optimizer step changes the shards alone
    assert recorder.held is not None, "the model ends in a norm"
    hidden, recorder.held = recorder.held, None
    result = TrainerReplay(
        recorder,
        batch.input_ids.tolist(),
        batch.positions.tolist(),
        scores.logprobs.cpu().numpy(),
        np.empty(len(sample.token_ids), np.float32),
    )
    targets, first = batch.targets, len(sample.prompt_token_ids) - 1
    for start in range(0, len(sample.token_ids), _ROWS):
        part = slice(start, start + _ROWS)
        logits = linear(hidden[targets.rows[part]], weight, out_dtype=torch.float32)
        where = np.arange(first + start, first + start + logits.shape[0])
        recorder.add(HEAD, where, logits, Call("packed", tuple(logits.shape), "float32"))
        shared = token_logprobs(logits, targets.token_ids[part], targets.inv_temperature[part], targets.min_logit[part])
        result.shared_logprobs[part] = shared.logprobs.cpu().numpy()
        if recorder.keep is not None and recorder.keep.position in where:
            result.spot_logits = logits[recorder.keep.position - where[0]].cpu().clone()
    return result


def first_unequal_weight(engine_model: nn.Module, trainer: Trainer) -> tuple[str, list[str]] | None:
    """The first parameter whose bits differ between rollout and trainer, and all such names; None if all agree."""
    held = dict(engine_model.named_parameters())
    wrong = [
        name
        for name, tensor in trainer.weights.items()
        if name not in held or held[name].dtype != tensor.dtype or not _same_bits(held[name].detach(), tensor)
    ]
    return (wrong[0], wrong) if wrong else None


def weights_given_back(held: GivenBack, trainer: Trainer) -> list[str]:
    """The parameters whose bits in the rollout, before their memory was given back, were not the trainer's."""
    return [name for name, tensor in trainer.weights.items() if held.checksums.get(name) != checksum(tensor)]


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    as_bytes = (t.contiguous().view(torch.uint8) for t in (left, right.to(left.device)))
    return torch.equal(*as_bytes)
