"""Everything a run needs, built from its configuration: in this process, or in one process per GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vexact.audit.environment import environment
from vexact.config import Config
from vexact.data import DataOrder, PromptDataset
from vexact.distributed import Layout, RankInfo, WorkerGroup, start_workers
from vexact.reward.pool import RewardPool
from vexact.rollout import Engine
from vexact.rollout.protocol import ForeignRollout
from vexact.trainer.checkpoint import Progress, ShardGroup, ShardWriter, restore
from vexact.trainer.resume.identity import weights_digest
from vexact.trainer.step.profile import StageProfiler
from vexact.trainer.workers.groups import ActorGroup, EngineGroup, ReferenceGroup, largest
from vexact.trainer.workers.heap import freeze_heap
from vexact.trainer.workers.inputs import Inputs, num_steps, start_rewards
from vexact.trainer.workers.memory import advising
from vexact.trainer.workers.memory_use import MemoryUse
from vexact.trainer.workers.parts import build_actor, build_engine, build_reference
from vexact.trainer.workers.peak_flops import peak_flops
from vexact.trainer.workers.roles import Roles, roles_of
from vexact.trainer.workers.worker import Worker
from vexact.training import Actor, Reference
from vexact.training.passes.forward import Scored
from vexact.training.passes.redraw import Redraw
from vexact.types import TrainSequence
from vexact.weights import sync_weights


@dataclass
class Workers:
    """What the loop works with. In one process the engine, the actor and the reference are the objects themselves, else
    groups that look like them."""

    tokenizer: Any
    train_data: PromptDataset
    val_data: PromptDataset | None
    order: DataOrder
    engine: Engine | ForeignRollout | EngineGroup
    actor: Actor | ActorGroup
    reference: Reference | ReferenceGroup | None
    rewards: RewardPool
    shards: ShardGroup
    profiler: StageProfiler  # of the stages that run in this process
    group: WorkerGroup | None = None
    frees_cache: bool = False  # the key-value cache's memory serves the training while nothing is generated
    sleeps: bool = False  # and so does the memory of the rollout's weights, which a sync brings anew
    _memory: MemoryUse = field(default_factory=MemoryUse, init=False)
    _is_asleep: bool = field(default=False, init=False)
    _is_frozen: bool = field(default=False, init=False)

    def sync_weights(self, version: int, keep: bool = False) -> dict[str, float]:
        """The rollout gets the actor's weights as ``version``, compared bit for bit; with ``keep`` they stay at hand
        for ``rescore_at`` over two more versions.

        Returns:
            Times and sizes of the sync, ``perf/…_gb`` of the process with most memory in use, and
            ``perf/num_alloc_retries`` since the last sync of the one with most.

        Raises:
            WeightSyncError: what arrived is not what was sent.
        """
        if self.group is None:
            assert not isinstance(self.engine, EngineGroup)
            assert isinstance(self.actor, Actor)
            metrics = sync_weights(self.actor, self.engine, version) | self._memory.metrics()
        else:
            assert isinstance(self.engine, EngineGroup)
            results: list[dict[str, float]] = self.group.call("sync", version, keep, stage="the weight sync")
            self.engine.weights_version = version
            metrics = results[0] | largest(results, "perf/")
        self._is_asleep = False
        return metrics

    @property
    def num_processes(self) -> int:
        """One per GPU."""
        return 1 if self.group is None else self.group.size

    def release_memory(self) -> None:
        """Lends the memory of the key-value cache, and of a rollout that sleeps the weights', to the training, where
        that is of use. Only a sync brings weights back."""
        if self.frees_cache:
            self.engine.release_kv_cache()
        if self.sleeps:
            assert isinstance(self.engine, Engine | EngineGroup), "the configuration was checked"
            self.engine.release_weights()
            self._is_asleep = True

    def resume_cache(self) -> None:
        """Takes the memory of the key-value cache back."""
        if self.frees_cache:
            self.engine.resume_kv_cache()

    def wake(self, version: int) -> None:
        """Has a rollout that sleeps hold the actor's weights again, which are still those of ``version``."""
        if self._is_asleep:
            self.sync_weights(version)

    @contextmanager
    def at_rest(self, version: int) -> Iterator[None]:
        """A stretch in which the actor computes and needs the room of a rollout that sleeps; it wakes with weights of
        ``version``. Nothing happens to any other rollout."""
        if self.sleeps:
            self.release_memory()
        yield
        if self.sleeps:
            self.wake(version)
            self.resume_cache()

    def rescore_at(self, version: int, sequences: Sequence[TrainSequence], redraw: Redraw | None) -> Scored:
        """``actor.rescore`` under an earlier version of the weights, one that was kept."""
        assert isinstance(self.actor, ActorGroup), "one process generates with the version it trains"
        return self.actor.rescore(sequences, redraw, version)

    def environment(self) -> dict[str, object]:
        """Versions and device of the first process that trains."""
        if self.group is None:
            assert isinstance(self.actor, Actor)
            return environment(self.actor.ranks.device)
        return dict(self.group.call("environment", ranks=[0], stage="set-up")[0])

    def peak_flops(self) -> float | None:
        """Operations a second, at most, of all GPUs that train together; None where one of them is not known."""
        if isinstance(self.actor, ActorGroup):
            peaks = self.actor.peak_flops()
        else:
            peaks = [peak_flops(self.actor.ranks.device, self.actor.config.dtype)]
        known = [peak for peak in peaks if peak is not None]
        return sum(known) if len(known) == len(peaks) else None

    def weights_digest(self) -> str:
        """SHA-256 of the actor's weights as they are."""
        if isinstance(self.actor, ActorGroup):
            return self.actor.weights_digest()
        with self.actor.resident():
            return weights_digest(self.actor.model)

    def restore(self, path: Path) -> Progress:
        """Puts the state of a verified checkpoint into the actor. Raises CheckpointError."""
        return self.actor.restore(path) if isinstance(self.actor, ActorGroup) else restore(path, self.actor)

    def heeding(self) -> AbstractContextManager[None]:
        """Around what works with them: see ``WorkerGroup.heeding``."""
        return nullcontext() if self.group is None else self.group.heeding()

    def freeze_heap(self) -> None:
        """Has the garbage collector of every process pass over what it holds when the first step begins; until
        ``close`` in this one, which may have a life after the run."""
        if self.group is not None:
            self.group.call("freeze_heap", stage="set-up")
        self._is_frozen = True
        freeze_heap()

    def close(self) -> None:
        """Ends the reward processes, the worker processes and what a foreign rollout has started."""
        if self._is_frozen:
            gc.unfreeze()
        self.rewards.close()
        if not isinstance(self.engine, Engine | EngineGroup):
            self.engine.close()
        if self.group is not None:
            self.group.close()


def build_workers(config: Config, layout: Layout, inputs: Inputs) -> Workers:
    """Reads the model and starts the reward processes, and with several ranks theirs.

    Raises:
        ValueError, FileNotFoundError: what the user has to fix, named.
        WorkerError, ClusterError: a process could not be started, or failed in starting.
    """
    num_rows = len(inputs.train_data)
    total_steps = num_steps(config, num_rows)
    common: dict[str, Any] = {
        "tokenizer": inputs.tokenizer,
        "train_data": inputs.train_data,
        "val_data": inputs.val_data,
        "order": DataOrder(num_rows, config.data_seed, config.data.shuffle),
    }
    frees_cache = config.rollout.free_cache_engine and layout.device == "cuda"
    if layout.world_size == 1:
        device = torch.device(layout.device)
        actor = build_actor(config, device, total_steps)
        reference = build_reference(config, device) if config.needs_reference else None
        engine = build_engine(config, inputs.tokenizer, device)  # last: its cache takes a share of the memory left
        return Workers(
            **common,
            engine=engine,
            actor=actor,
            reference=reference,
            shards=ShardWriter(actor.sharded_state),
            profiler=StageProfiler.of(config, rank=0),
            rewards=start_rewards(config),
            frees_cache=frees_cache,
            sleeps=config.rollout.enable_sleep_mode,
        )
    roles = roles_of(config, layout.world_size)
    factory = partial(_worker, config, roles, total_steps)
    group = start_workers(layout, factory, timeout_s=config.trainer.worker_timeout_s)
    try:
        with group.heeding():
            actors = ActorGroup(config, group, roles, total_steps)
            return Workers(
                **common,
                engine=EngineGroup(config, group, roles),
                actor=actors,
                reference=ReferenceGroup(group, roles) if config.needs_reference else None,
                shards=actors,
                profiler=StageProfiler(config.run_dir),
                rewards=start_rewards(config),
                group=group,
                frees_cache=frees_cache and roles.colocated,
                sleeps=config.rollout.enable_sleep_mode,
            )
    except BaseException:
        group.close()
        raise


def _worker(config: Config, roles: Roles, total_steps: int, info: RankInfo) -> Worker:
    with advising(config, lambda: None):
        return Worker(config, roles, total_steps, info)
