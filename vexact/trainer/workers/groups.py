"""Several processes as the driver sees them: one engine, one actor, one reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vexact.audit.audit import Evidence
from vexact.config import Config
from vexact.distributed import Pending, RankInfo, WorkerGroup
from vexact.rollout import SamplingParams
from vexact.rollout.replicas import split_prompts
from vexact.rollout.requests.intake import expand
from vexact.rollout.stats import merge_stats
from vexact.trainer.checkpoint import Progress, Written
from vexact.trainer.workers.roles import Roles
from vexact.trainer.workers.settings import actor_config
from vexact.trainer.workers.worker import EngineFacts, Updated
from vexact.training import ActorConfig, Ledger, PeerStopped
from vexact.training.passes.forward import Scored
from vexact.training.passes.redraw import Redraw
from vexact.training.protocol import Audit
from vexact.types import Sample, TrainSequence

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingSamples:
    """Samples that replicas are generating."""

    pending: Pending
    shares: list[list[int]]  # prompts by replica
    n: list[int]  # samples of each prompt
    on_result: Callable[[Sequence[Sequence[Sample]]], None]

    def result(self) -> list[Sample]:
        """Waits; prompt-major, as ``Engine.generate`` gives them."""
        by_prompt: list[list[Sample]] = [[] for _ in self.n]
        by_replica: list[list[Sample]] = self.pending.result()
        self.on_result(by_replica)
        for share, samples in zip(self.shares, by_replica, strict=True):
            at = iter(samples)
            for index in share:
                by_prompt[index] = [next(at) for _ in range(self.n[index])]
        return [sample for of_prompt in by_prompt for sample in of_prompt]


class EngineGroup:
    """Replicas of the engine, one per rank that generates. A sample does not depend on the replica it comes from."""

    def __init__(self, config: Config, group: WorkerGroup, roles: Roles) -> None:
        self.seed = config.rollout_seed
        self._group, self._ranks = group, list(roles.rollouts)
        self.weights_version = 0
        self.num_replicas = len(self._ranks)
        facts: list[EngineFacts] = self._group.call("engine_facts", ranks=self._ranks, stage="set-up")
        self.vocab_size, self.max_model_len = facts[0].vocab_size, facts[0].max_model_len
        self.num_cache_tokens = min(fact.num_cache_tokens for fact in facts)
        self._cache_tokens = [fact.num_cache_tokens for fact in facts]
        self._num_samples = self._num_sampled_tokens = 0
        self._generated: dict[str, tuple[int, int]] = {}  # request to rank and weights version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str],
    ) -> list[Sample]:
        """As ``Engine.generate``, spread over the replicas by load."""
        return self.start_generate(prompts, sampling_params, request_ids).result()

    def start_generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str],
        stage: str = "generation",
    ) -> PendingSamples:
        """``generate`` without waiting; ``stage`` is how messages call it."""
        params = expand("sampling_params", sampling_params, len(prompts))
        expected = max(each.max_tokens for each in params) / 2
        if self._num_samples:
            expected = self._num_sampled_tokens / self._num_samples
        lengths, n = [len(prompt) for prompt in prompts], [each.n for each in params]
        shares = split_prompts(lengths, n, self._cache_tokens, expected)
        arguments = [
            ([prompts[i] for i in share], [params[i] for i in share], [request_ids[i] for i in share])
            for share in shares
        ]
        pending = self._group.start_each("generate", arguments, ranks=self._ranks, stage=stage)
        return PendingSamples(pending, shares, n, self._note)

    def worker_of(self, sample: Sample) -> RankInfo:
        """Who generated a sample of the last two weights versions."""
        return self._group.infos[self.rank_of(sample.request_id)]

    def rank_of(self, request_id: str) -> int:
        """The rank that generated a request of the last two weights versions; the first one for any other."""
        return self._generated.get(request_id, (self._ranks[0], 0))[0]

    def _note(self, by_replica: Sequence[Sequence[Sample]]) -> None:
        for rank, samples in zip(self._ranks, by_replica, strict=True):
            self._num_samples += len(samples)
            self._num_sampled_tokens += sum(len(sample.token_ids) for sample in samples)
            self._generated |= {sample.request_id: (rank, sample.weights_version) for sample in samples}
        oldest = max((version for _, version in self._generated.values()), default=0) - 1
        self._generated = {name: made for name, made in self._generated.items() if made[1] >= oldest}

    def stats(self) -> dict[str, float]:
        """``rollout/*`` metrics since the last call, over all replicas."""
        return merge_stats(self._group.call("take_engine_stats", ranks=self._ranks, stage="generation")).metrics()

    def clear_prefix_cache(self) -> None:
        self._group.call("clear_prefix_cache", ranks=self._ranks, stage="generation")

    def release_kv_cache(self) -> None:
        self._group.call("release_kv_cache", ranks=self._ranks, stage="releasing the KV cache")

    def release_weights(self) -> None:
        self._group.call("release_weights", ranks=self._ranks, stage="releasing the rollout's weights")

    def resume_kv_cache(self) -> None:
        self._group.call("resume_kv_cache", ranks=self._ranks, stage="resuming the KV cache")


class ActorGroup:
    """The actor's shards. Every rank gets the whole batch and works on its micro-batches."""

    def __init__(self, config: Config, group: WorkerGroup, roles: Roles, total_steps: int) -> None:
        self._group, self.ranks = group, list(roles.trainers)
        self._trained: dict[str, int] = {}  # request to rank, of the last call
        self.config: ActorConfig = actor_config(config, torch.device(group.infos[0].device), total_steps)
        self.problems: list[str] = []

    def update(
        self,
        sequences: Sequence[TrainSequence],
        audit: Audit | None = None,
        *,
        ledger: Ledger | None = None,
        redraw: Redraw | None = None,
        every_token: bool = False,
    ) -> dict[str, float]:
        """As ``Actor.update``. Every rank compares its own share before the optimizer step; ``audit`` then sees all."""
        results: list[Updated] = self._group.call(
            "update", sequences, ledger, redraw, every_token, audit is not None, ranks=self.ranks, stage="the update"
        )
        self.problems = list(dict.fromkeys(problem for result in results for problem in result.problems))
        if audit is not None:
            self._show(audit, sequences, redraw, results)
        stopped = [result.stopped for result in results if result.stopped is not None]
        if stopped:
            raise min(stopped, key=lambda error: isinstance(error, PeerStopped))  # the cause, not what followed from it
        parts = [result.metrics for result in results if result.metrics is not None]
        return parts[0] | largest(parts, "timing_s/")

    def _show(
        self,
        audit: Audit,
        sequences: Sequence[TrainSequence],
        redraw: Redraw | None,
        results: Sequence[Updated],
    ) -> None:
        """Gives what all ranks saw to the audit, in the order of the batch; it raises as in one process."""
        self._note(sequences, [result.evidence.indices for result in results])
        seen = gathered([_scored(result.evidence) for result in results])
        for result in results:
            if redraw is not None and result.evidence.redrawn is not None:
                redraw.absorb(result.evidence.redrawn)
        if seen.indices:
            try:
                audit(*seen)
            except Exception as error:
                self._name_rank(error, results)
                raise

    def _name_rank(self, error: Exception, results: Sequence[Updated]) -> None:
        stopped = [rank for rank, result in zip(self.ranks, results) if type(result.stopped) is type(error)]
        if stopped and len(self.ranks) > 1:
            error.add_note(f"compared by rank {', '.join(map(str, stopped))} of {len(self.ranks)}")

    def logprobs(self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None) -> list[np.ndarray]:
        """As ``Actor.logprobs``."""
        return self.rescore(sequences, redraw).logprobs

    def rescore(
        self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None, version: int | None = None
    ) -> Scored:
        """As ``Actor.rescore``; under an earlier ``version`` of the weights if there is one given."""
        results = self._group.call("rescore", sequences, redraw, version, ranks=self.ranks, stage="scoring")
        self._note(sequences, [scored.indices for scored, _ in results])
        for _, redrawn in results:
            if redraw is not None and redrawn is not None:
                redraw.absorb(redrawn)
        return joined([scored for scored, _ in results], len(sequences))

    def rank_of(self, request_id: str) -> int:
        """The rank that computed a request's log-probabilities in the last update or scoring, the first one if none."""
        return self._trained.get(request_id, self.ranks[0])

    def _note(self, sequences: Sequence[TrainSequence], by_rank: Sequence[Sequence[int]]) -> None:
        pairs = [(i, rank) for rank, indices in zip(self.ranks, by_rank, strict=True) for i in indices]
        self._trained = {sequences[i].sample.request_id: rank for i, rank in pairs}

    def peak_flops(self) -> list[float | None]:
        """Of every rank that trains."""
        return list(self._group.call("peak_flops", ranks=self.ranks, stage="set-up"))

    def weights_digest(self) -> str:
        digests = self._group.call("weights_digest", ranks=self.ranks, stage="set-up")
        return str(digests[0])

    def restore(self, path: Path) -> Progress:
        """Loads an already verified checkpoint, each rank its rows. Raises CheckpointError."""
        restored: list[Progress] = self._group.call("restore", path, ranks=self.ranks, stage="resuming")
        return restored[0]

    def blind_to(self, file: Path) -> list[RankInfo]:
        """The ranks on whose machines there is no such file."""
        seen = self._group.call("sees", file, ranks=self.ranks, stage="set-up")
        return [self._group.infos[rank] for rank, sees in zip(self.ranks, seen, strict=True) if not sees]

    # ShardGroup, for the Saver

    def save(self, step: int, directory: Path, background: bool) -> list[Written] | None:
        return _all(self._group.call("save_shard", step, directory, background, ranks=self.ranks, stage="a checkpoint"))

    def poll(self) -> list[Written] | None:
        return _all(self._group.call("poll_shard", ranks=self.ranks, stage="a checkpoint"))

    def wait(self) -> list[Written]:
        written = _all(self._group.call("wait_shard", ranks=self.ranks, stage="a checkpoint"))
        assert written is not None
        return written

    def abandon(self) -> None:
        """Ends the group, so that no rank writes any more: only a run that ends gives up a checkpoint."""
        self._group.close()


class ReferenceGroup:
    """The reference's shards."""

    def __init__(self, group: WorkerGroup, roles: Roles) -> None:
        self._group, self._ranks = group, list(roles.trainers)

    def logprobs(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """As ``Reference.logprobs``."""
        results = self._group.call("reference_logprobs", sequences, ranks=self._ranks, stage="the reference's scoring")
        return joined(results, len(sequences)).logprobs


def largest(parts: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Of the metrics that begin with ``prefix``, in whichever part they are, the largest value.

    >>> largest([{"timing_s/gen": 1.0, "loss": 3.0}, {"timing_s/gen": 2.0}, {}], "timing_s/")
    {'timing_s/gen': 2.0}
    """
    names = dict.fromkeys(name for part in parts for name in part if name.startswith(prefix))
    return {name: max(part[name] for part in parts if name in part) for name in names}


def joined(shares: Sequence[Scored], num_sequences: int) -> Scored:
    """Every rank's share put together; raises AssertionError when a sequence is missing."""
    whole = gathered(shares)
    missing = num_sequences - len(set(whole.indices))
    assert not missing, f"{missing} sequences were scored by no rank"
    return whole


def gathered(shares: Sequence[Scored]) -> Scored:
    """What ranks have scored, in the order of the sequences; experts if all that scored something say them."""
    indices = [i for share in shares for i in share.indices]
    order = sorted(range(len(indices)), key=indices.__getitem__)
    logprobs = [values for share in shares for values in share.logprobs]
    routes = [values for share in shares for values in share.routes or ()]
    in_order = [routes[i] for i in order] if len(routes) == len(indices) and routes else None
    return Scored([indices[i] for i in order], [logprobs[i] for i in order], in_order)


def _scored(evidence: Evidence) -> Scored:
    return Scored(evidence.indices, evidence.logprobs, evidence.routes)


def _all(lists: Sequence[list[Written] | None]) -> list[Written] | None:
    whole: list[Written] = []
    for part in lists:
        if part is None:
            return None
        whole += part
    return whole
