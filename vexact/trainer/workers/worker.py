"""What one of several processes holds and does: a shard of the actor, a replica of the engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from vexact.audit import Audit, DrawError, ExactnessError
from vexact.audit.audit import Evidence
from vexact.audit.environment import environment
from vexact.audit.explain.operators import Operators, operators_of
from vexact.config import Config
from vexact.distributed import RankInfo
from vexact.distributed.process_group import new_group
from vexact.models.nonfinite import cause_of_nonfinite
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.protocol import ForeignRollout
from vexact.rollout.stats import Stats
from vexact.trainer.checkpoint import Progress, ShardWriter, Written, restore
from vexact.trainer.resume.identity import weights_digest
from vexact.trainer.step.profile import StageProfiler
from vexact.trainer.workers.explain import Question, explain_here, give_weights, take_weights
from vexact.trainer.workers.heap import freeze_heap
from vexact.trainer.workers.inputs import load_tokenizer
from vexact.trainer.workers.memory import memory_advice
from vexact.trainer.workers.memory_use import MemoryUse
from vexact.trainer.workers.parts import build_actor, build_engine, build_reference
from vexact.trainer.workers.peak_flops import peak_flops
from vexact.trainer.workers.roles import Roles
from vexact.training import Actor, Ledger, PeerStopped, Reference
from vexact.training.passes.forward import Scored
from vexact.training.passes.redraw import Redraw, Redrawn
from vexact.training.state.past_weights import PastWeights
from vexact.types import Sample, TrainSequence
from vexact.weights import receive_weights, send_weights, sync_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What does not change over an engine's life."""

    vocab_size: int
    max_model_len: int
    num_cache_tokens: int


@dataclass(frozen=True, slots=True)
class Updated:
    """One rank's update. A rank that stopped before the optimizer step has no metrics."""

    metrics: dict[str, float] | None
    problems: list[str]
    evidence: Evidence  # what this rank's forward gave, for the audit of the whole batch
    stopped: Exception | None = None


class Worker:
    """Its methods are called from the driver. Those of the actor are collective: all ranks that train get the same
    call, with the same sequences."""

    def __init__(self, config: Config, roles: Roles, total_steps: int, info: RankInfo) -> None:
        """Reads the model. Raises ValueError, FileNotFoundError: what the user has to fix, named."""
        self.config, self.roles, self.info, device = config, roles, info, torch.device(info.device)
        self.memory_advice = memory_advice(config)  # the host of this worker asks for it
        self._profiler = StageProfiler.of(config, info.rank)
        self._memory = MemoryUse()
        self._engine: Engine | ForeignRollout | None = None
        self._actor: Actor | None = None
        self._reference: Reference | None = None
        trains = info.rank in roles.trainers
        group = None if roles.colocated else new_group(roles.trainers, config.trainer.worker_timeout_s)
        if trains:
            self._actor = build_actor(config, device, total_steps, group)
            self._past = PastWeights(self._actor.model, self._actor.config.torch_dtype)
            self._shards = ShardWriter(self._actor.sharded_state, info.rank, len(roles.trainers))
        if trains and config.needs_reference:
            self._reference = build_reference(config, device, group)
        if info.rank in roles.rollouts:  # last: its key-value cache takes a share of the memory that is left
            self._engine = build_engine(config, load_tokenizer(config), device)

    @property
    def engine(self) -> Engine | ForeignRollout:
        assert self._engine is not None, f"rank {self.info.rank} does not generate"
        return self._engine

    @property
    def actor(self) -> Actor:
        assert self._actor is not None, f"rank {self.info.rank} does not train"
        return self._actor

    def environment(self) -> dict[str, object]:
        return environment(torch.device(self.info.device))

    def peak_flops(self) -> float | None:
        return peak_flops(torch.device(self.info.device), self.actor.config.dtype)

    def engine_facts(self) -> EngineFacts:
        engine = self.engine
        return EngineFacts(engine.vocab_size, engine.max_model_len, engine.num_cache_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], request_ids: Sequence[str]
    ) -> list[Sample]:
        with self._profiler("rollout", request_ids[0] if request_ids else ""):
            return self.engine.generate(prompts, params, request_ids)

    def take_engine_stats(self) -> Stats:
        return self.engine.take_stats()

    def clear_prefix_cache(self) -> None:
        self.engine.clear_prefix_cache()

    def release_kv_cache(self) -> None:
        self.engine.release_kv_cache()

    def resume_kv_cache(self) -> None:
        self.engine.resume_kv_cache()

    def release_weights(self) -> None:
        assert isinstance(self.engine, Engine), "another engine's weights are its own"
        self.engine.release_weights()

    def sync(self, version: int, keep: bool) -> dict[str, float]:
        """Called on all ranks: the weights of the actor become those of every engine; with ``keep`` ranks that train
        alone keep a copy. Also says what memory this rank uses. Raises WeightSyncError."""
        if self.roles.colocated:
            metrics = sync_weights(self.actor, self.engine, version)
        elif self._actor is not None:
            with self._actor.resident() if keep else nullcontext():
                self._past.advance(version, keep)
            metrics = send_weights(self._actor, version)
        else:
            metrics = receive_weights(self.engine, version)
        return metrics | self._memory.metrics()

    def update(
        self,
        sequences: Sequence[TrainSequence],
        ledger: Ledger | None,
        redraw: Redraw | None,
        every_token: bool,
        compare: bool,
    ) -> Updated:
        """As ``Actor.update``; bits that differ stop all ranks before the optimizer step when exactness is strict."""
        audit = Audit(self.config.trainer.exactness, partial=True)
        audit.begin([sequence.sample for sequence in sequences])
        audit.redraw = redraw
        metrics, stopped = None, None
        try:
            with self._profiler("update", sequences[0].sample.request_id):
                metrics = self.actor.update(
                    sequences, audit.check if compare else None, ledger=ledger, redraw=redraw, every_token=every_token
                )
        except (ExactnessError, DrawError, PeerStopped) as error:
            stopped = error
        return Updated(metrics, self.actor.problems, audit.evidence, stopped)

    def rescore(
        self, sequences: Sequence[TrainSequence], redraw: Redraw | None, version: int | None
    ) -> tuple[Scored, Redrawn | None]:
        """This rank's share, under the present weights or those of an earlier version."""
        with self.actor.resident(), self._past.in_place(version) if version is not None else nullcontext():
            scored = self.actor.score(sequences, redraw)
        return scored, None if redraw is None else redraw.take()

    def reference_logprobs(self, sequences: Sequence[TrainSequence]) -> Scored:
        """This rank's share."""
        assert self._reference is not None, "no KL term is on"
        return self._reference.score(sequences)

    def why_not_finite(self) -> str:
        """A sentence, the same on every rank that trains."""
        return cause_of_nonfinite(self.actor.named_weights(), self.actor.config.torch_dtype)

    def operators(self) -> Operators:
        """What the actor runs in place of the invariant operators."""
        return operators_of(self.actor.model)

    def explain(self, question: Question) -> str | None:
        """Called on all ranks that train and on the one whose engine explains; the latter gives the text."""
        if self._actor is None:
            weights = take_weights(question, self._exact_engine.model)
        else:
            weights = give_weights(question, self._actor, self._past, self.info.rank, self.roles.trainers)
        if self.info.rank != question.generated_by:
            return None
        return explain_here(question, weights, self._exact_engine, self._actor)

    @property
    def _exact_engine(self) -> Engine:
        assert isinstance(self.engine, Engine), "only a rollout that should be exact is explained"
        return self.engine

    def weights_digest(self) -> str:
        """Of the whole model, on every rank that trains."""
        with self.actor.resident():
            return weights_digest(self.actor.model)

    def freeze_heap(self) -> None:
        """As ``heap.freeze_heap``, until this process leaves the process group."""
        freeze_heap()

    def sees(self, file: Path) -> bool:
        return file.is_file()

    def save_shard(self, step: int, directory: Path, background: bool) -> list[Written] | None:
        return self._shards.save(step, directory, background)

    def poll_shard(self) -> list[Written] | None:
        return self._shards.poll()

    def wait_shard(self) -> list[Written]:
        return self._shards.wait()

    def close(self) -> None:
        """Ends what this rank writes beside the steps, and what a foreign rollout has started."""
        if self._engine is not None and not isinstance(self._engine, Engine):
            self._engine.close()
        if self._actor is not None:
            self._shards.abandon()

    def restore(self, path: Path) -> Progress:
        return restore(path, self.actor)
