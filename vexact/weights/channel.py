"""Trainer to rollout where some ranks train and others generate: each trainer rank broadcasts its own rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from vexact.weights.buckets import BUCKET_BYTES, BucketPlan
from vexact.weights.errors import WeightSyncError
from vexact.weights.handover import Landing, WeightTaker
from vexact.weights.manifest import Manifest, manifest, shard_mesh
from vexact.weights.part_times import PartTimes
from vexact.weights.peers import Peers
from vexact.weights.sync import WeightSource, WeightTarget, planned
from vexact.weights.transfer import (
    Buffers,
    Incoming,
    Outgoing,
    broadcasts,
    finish,
    raise_first_difference,
    stream,
    table,
    verdict,
)


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a trainer rank has to send."""

    manifest: Manifest
    num_shards: int
    shard: int  # this rank's
    bucket_bytes: int


@torch.no_grad()
def send_weights(
    actor: WeightSource, version: int, group: dist.ProcessGroup | None = None, *, bucket_bytes: int = BUCKET_BYTES
) -> dict[str, float]:
    """Sends the actor's weights, in its compute dtype, to the ranks of ``group`` that call ``receive_weights``.

    All ranks that share the actor's parameters call it together. Returns and raises what ``receive_weights`` does.

    Args:
        group: trainer and rollout ranks, and no others. Default: the default group.
        bucket_bytes: memory of one of the two buckets, on either side.
    """
    peers, device = Peers.spanning(group), actor.ranks.device

    def announce() -> tuple[Announcement, Announcement]:
        mesh = shard_mesh(actor.model)
        shard, num_shards = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        own = Announcement(manifest(actor.model, actor.config.torch_dtype), num_shards, shard, bucket_bytes)
        return own, own

    def prepare() -> tuple[tuple[BucketPlan, Buffers], None]:
        plan = BucketPlan.of(own.manifest, own.num_shards, bucket_bytes)
        return (plan, Buffers(plan, device)), None

    own, announced = peers.begin(version, announce)
    senders = _senders(version, peers, announced)
    (plan, buffers), _ = peers.begin(version, prepare)
    outgoing, times = Outgoing(plan, own.shard, actor.named_shards(), device), PartTimes(device)
    exchange = broadcasts(senders, peers)
    stream(plan, buffers, exchange, times, outgoing=outgoing)
    finish(exchange(table(outgoing.checksums(), own.shard, own.num_shards)))
    with times.part("check"):
        verdicts = peers.gathered(torch.zeros(4, dtype=torch.int64, device=device))  # nothing differs here
    raise_first_difference(verdicts, version, plan, peers, senders)
    return {"rollout/weights_bytes": float(plan.num_bytes), **times.metrics()}


@torch.no_grad()
def receive_weights(
    engine: WeightTarget | WeightTaker, version: int, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Takes what ``send_weights`` sends into the engine as ``version``, and answers whether every bit arrived.

    Names, shapes and dtypes are announced and compared before anything changes. The engine has the version only after
    the checksums of all engines were found to be the senders'. For a ``WeightTaker`` that holds of a copy on its
    device, which it is then given.

    Returns:
        ``rollout/weights_bytes``, and ``timing_s/weights_<part>`` for cast, gather (waiting for buckets), copy and
        check, as far as this side has them.

    Raises:
        RuntimeError: the engine has unfinished requests.
        ValueError: there is no process group, or names, shapes or dtypes do not match the engine's model.
        WeightSyncError: bits arrived differently in some engine, which is named, and no engine of the group generates
            until weights arrive; or another rank could not begin, and nothing has changed.
    """
    place = Landing(engine) if isinstance(engine, WeightTaker) else _InPlace(engine)
    peers, device = Peers.spanning(group), place.device

    def announce() -> tuple[None, None]:
        place.check_updatable()
        return None, None

    _, announced = peers.begin(version, announce)
    senders = _senders(version, peers, announced)
    first = next(one for one in announced if one is not None)

    def prepare() -> tuple[tuple[BucketPlan, Incoming, Buffers], None]:
        parameters = place.parameters(first.manifest)
        plan = planned(first.manifest, first.num_shards, parameters, first.bucket_bytes)
        return (plan, Incoming(plan, parameters), Buffers(plan, device)), None

    (plan, incoming, buffers), _ = peers.begin(version, prepare)
    exchange, times = broadcasts(senders, peers), PartTimes(device)
    with place.replacing_weights(version):
        stream(plan, buffers, exchange, times, incoming=incoming)
        sent = torch.zeros((plan.num_ranks, plan.num_pieces), dtype=torch.int64, device=device)
        finish(exchange(sent))
        with times.part("check"):
            verdicts = peers.gathered(verdict(sent, incoming.checksums()))
        raise_first_difference(verdicts, version, plan, peers, senders)
    return {"rollout/weights_bytes": float(plan.num_bytes), **times.metrics(), **place.metrics}


class _InPlace:
    """The parameters of our own engine."""

    def __init__(self, engine: WeightTarget) -> None:
        self._engine = engine
        self.device = next(engine.model.parameters()).device
        self.check_updatable = engine.check_updatable
        self.replacing_weights = engine.replacing_weights
        self.metrics: dict[str, float] = {}

    def parameters(self, specs: Manifest) -> Mapping[str, Tensor]:
        return self._engine.parameters_to_update()


def _senders(version: int, peers: Peers, announced: list[Announcement | None]) -> list[int]:
    """The ranks of the default group that hold shard 0, 1, … Raises WeightSyncError unless there is one of each, they
    announced the same, and somebody receives."""
    found = {rank: one for rank, one in enumerate(announced) if one is not None}
    if not found or len(found) == len(announced):
        raise WeightSyncError(
            f"weights version {version}: {len(found)} of {len(announced)} ranks send; some have to send and some to "
            "receive"
        )
    first_rank, first = next(iter(found.items()))
    for rank, one in found.items():
        if replace(one, shard=first.shard) != first:
            ranks = f"ranks {peers.global_rank(first_rank)} and {peers.global_rank(rank)}"
            raise WeightSyncError(f"weights version {version}: {ranks} send different tensors or bucket_bytes")
    holders = sorted((one.shard, peers.global_rank(rank)) for rank, one in found.items())
    if [shard for shard, _ in holders] != list(range(first.num_shards)):
        raise WeightSyncError(
            f"weights version {version}: ranks {[rank for _, rank in holders]} send shards "
            f"{[shard for shard, _ in holders]} of {first.num_shards}; each has to be sent once"
        )
    return [rank for _, rank in holders]
