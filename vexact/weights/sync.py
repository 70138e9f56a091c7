"""Trainer to rollout where every process is both: new weights in, and proof that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from vexact.weights.buckets import BUCKET_BYTES, BucketPlan
from vexact.weights.handover import WeightTaker, hand_over
from vexact.weights.manifest import Fit, Manifest, manifest, shard_mesh
from vexact.weights.part_times import PartTimes
from vexact.weights.peers import Peers
from vexact.weights.transfer import (
    Buffers,
    Incoming,
    Outgoing,
    all_gather,
    finish,
    raise_first_difference,
    stream,
    table,
    verdict,
)


class HasDtype(Protocol):
    @property
    def torch_dtype(self) -> torch.dtype: ...


class HasDevice(Protocol):
    @property
    def device(self) -> torch.device: ...


class WeightSource(Protocol):
    """The trainer's side: ``vexact.training.Actor``."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def config(self) -> HasDtype: ...

    @property
    def ranks(self) -> HasDevice: ...

    def named_shards(self) -> Iterable[tuple[str, Tensor, tuple[int, ...]]]:
        """(name, this rank's rows in any dtype on any device, full shape) in the order of the model's parameters."""

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """(name, whole tensor in the compute dtype) in the same order; ranks that share them iterate together."""


class WeightTarget(Protocol):
    """The rollout's side: ``vexact.rollout.Engine``."""

    def check_updatable(self) -> None: ...

    def parameters_to_update(self) -> Mapping[str, Tensor]: ...

    def replacing_weights(self, version: int) -> AbstractContextManager[Mapping[str, Tensor]]: ...

    @property
    def model(self) -> nn.Module: ...


@torch.no_grad()
def sync_weights(
    actor: WeightSource, engine: WeightTarget | WeightTaker, version: int, *, bucket_bytes: int = BUCKET_BYTES
) -> dict[str, float]:
    """Brings the actor's weights, in its compute dtype, into the engine as ``version`` and checks every bit of them.

    All ranks that share the actor's parameters call it together, each with an engine of its own. Shards are gathered
    bucket by bucket, each while the one before it is copied; a lone process copies directly. Every stretch of every
    tensor is fingerprinted where it leaves its owner and again in the engine; the engine has the version only after the
    two were found equal on all ranks.

    Args:
        engine: a ``WeightTaker`` gets whole tensors, one at a time, and proves itself that it computes with them.
        bucket_bytes: memory of one of the two buckets; of a lone process, most of what is cast at a time.

    Returns:
        ``rollout/weights_bytes``, and ``timing_s/weights_<part>`` for cast, gather (what the copies did not hide), copy
        and check.

    Raises:
        RuntimeError: the engine has unfinished requests.
        torch.OutOfMemoryError: there is no room for weights that had been given back.
        ValueError: names, shapes or dtypes do not match the engine's model. Nothing has changed then.
        WeightSyncError: bits in the engine of a rank differ from those sent, or another rank could not begin. After the
            first every engine refuses to generate until weights arrive.
    """
    peers = Peers.sharing(shard_mesh(actor.model))
    if isinstance(engine, WeightTaker):
        taker = engine

        def check() -> tuple[None, None]:
            taker.check_updatable()
            return None, None

        peers.begin(version, check)
        return hand_over(taker, actor.named_weights(), version)
    device = next(engine.model.parameters()).device

    def prepare() -> tuple[tuple[BucketPlan, Incoming, Buffers | None], str]:
        parameters = engine.parameters_to_update()
        plan = planned(manifest(actor.model, actor.config.torch_dtype), peers.size, parameters, bucket_bytes)
        buffers = None if peers.group is None else Buffers(plan, device)
        return (plan, Incoming(plan, parameters), buffers), plan.digest

    (plan, incoming, buffers), digests = peers.begin(version, prepare)
    peers.require_equal(version, digests, "tensors or bucket_bytes")
    outgoing, times = Outgoing(plan, peers.rank, actor.named_shards(), device), PartTimes(device)
    with engine.replacing_weights(version):
        if peers.group is None:
            _copy(plan, outgoing, incoming, times)
            sent = outgoing.checksums().unsqueeze(0)
        else:
            assert buffers is not None
            exchange = all_gather(peers)
            stream(plan, buffers, exchange, times, outgoing=outgoing, incoming=incoming)
            sent = table(outgoing.checksums(), peers.rank, peers.size)
            finish(exchange(sent))
        with times.part("check"):
            verdicts = peers.gathered(verdict(sent, incoming.checksums()))
        raise_first_difference(verdicts, version, plan, peers, peers.global_ranks)
    return {"rollout/weights_bytes": float(plan.num_bytes), **times.metrics()}


def planned(specs: Manifest, num_ranks: int, parameters: Mapping[str, Tensor], bucket_bytes: int) -> BucketPlan:
    """The plan of tensors that take the place of all ``parameters``. Raises ValueError listing what does not fit."""
    fit = Fit(parameters)
    for spec in specs:
        fit.admit(spec)
    fit.require_all()
    return BucketPlan.of(specs, num_ranks, bucket_bytes)


def _copy(plan: BucketPlan, outgoing: Outgoing, incoming: Incoming, times: PartTimes) -> None:
    """Of a lone process: what is cast goes straight to its place."""
    for bucket in plan.buckets:
        with times.part("cast"):
            values = outgoing.cast(bucket)
        with times.part("copy"):
            incoming.put(bucket, values)
