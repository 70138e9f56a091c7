"""The way of the bytes: shards are cast into buckets, buckets exchanged, and their pieces copied where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vexact.weights.buckets import Bucket, BucketPlan, Piece
from vexact.weights.errors import Difference, WeightSyncError
from vexact.weights.fingerprint import checksum_spans, checksums
from vexact.weights.part_times import PartTimes
from vexact.weights.peers import Peers

Exchange = Callable[[Tensor], list[dist.Work]]
"""Starts to bring every rank's row of a tensor (ranks, n) to the ranks that need it."""
Shards = Iterable[tuple[str, Tensor, tuple[int, ...]]]


def all_gather(peers: Peers) -> Exchange:
    """For ranks that all send and all receive."""

    return lambda rows: [peers.gather(rows)]


def broadcasts(senders: Sequence[int], peers: Peers) -> Exchange:
    """From several ranks of the default group, each the root of its own row, to all ``peers``."""

    def start(rows: Tensor) -> list[dist.Work]:
        return [dist.broadcast(row, root, group=peers.group, async_op=True) for row, root in zip(rows, senders)]

    return start


class Outgoing:
    """One rank's shards, cast piece by piece in the order of the plan, and the checksums of what was cast."""

    def __init__(self, plan: BucketPlan, rank: int, shards: Shards, device: torch.device) -> None:
        self._plan, self.rank, self._device = plan, rank, device
        self._shards: Iterator[tuple[str, Tensor, tuple[int, ...]]] = iter(shards)
        self._next = 0  # tensors taken so far
        self._rows = torch.empty(0)  # of the last one
        self._sums: list[Tensor] = []

    def cast(self, bucket: Bucket, slot: Tensor | None = None) -> list[Tensor]:
        """This rank's elements of every piece, in the dtype they travel in: views of ``slot`` (bytes), which holds them
        from now on; without one new tensors, or views of the shards where these are as they travel."""
        values, offsets = [], []
        for piece in bucket.pieces:
            begin, end = self._plan.extent(piece, self.rank)
            rows = self._rows_of(piece)[piece.start : piece.start + end - begin]
            if rows.device != self._device:
                rows = rows.to(self._device, non_blocking=True)  # before the cast: the host's would be slower
            if slot is None:
                values.append(rows.to(self._plan.manifest[piece.tensor].dtype))
            else:
                values.append(_in_slot(slot, piece, end - begin, self._plan).copy_(rows))
            offsets.append(begin)
        self._sums.append(checksums(values, offsets))
        return values

    def checksums(self) -> Tensor:
        """(P,) int64 of all pieces that were cast."""
        return torch.cat(self._sums)

    def _rows_of(self, piece: Piece) -> Tensor:
        while self._next <= piece.tensor:
            self._rows = self._take(self._next)
            self._next += 1
        return self._rows

    def _take(self, index: int) -> Tensor:
        spec, (name, shard, shape) = self._plan.manifest[index], next(self._shards)
        begin, end = spec.part(self.rank, self._plan.num_ranks)
        if (name, shape, shard.numel()) != (spec.name, spec.shape, end - begin):
            raise WeightSyncError(
                f"{spec} was announced, {end - begin} elements of it in shard {self.rank} of {self._plan.num_ranks}, "
                f"but the actor gave {shard.numel()} elements of {name} {shape}"
            )
        return shard.detach().reshape(-1)


def _in_slot(slot: Tensor, piece: Piece, length: int, plan: BucketPlan) -> Tensor:
    """The first ``length`` elements of a piece: slot (…, bytes) -> (…, length)."""
    spec = plan.manifest[piece.tensor]
    return slot[..., piece.slot_offset : piece.slot_offset + length * spec.itemsize].view(spec.dtype)


class Incoming:
    """The parameters of one engine, in the order of the manifest, as the target of pieces."""

    def __init__(self, plan: BucketPlan, parameters: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a parameter that is not laid out in rows."""
        self._plan = plan
        self._flat = []
        for spec in plan.manifest:
            parameter = parameters[spec.name].detach()
            if not parameter.is_contiguous():
                raise ValueError(f"the engine's {spec.name} is not contiguous; only contiguous ones can be sent to")
            self._flat.append(parameter.view(-1))

    def put(self, bucket: Bucket, values: Sequence[Tensor]) -> None:
        """Copies the pieces of a bucket that one rank has all of."""
        for piece, elements in zip(bucket.pieces, values, strict=True):
            self._flat[piece.tensor][piece.start : piece.start + piece.length].copy_(elements)

    def put_slots(self, bucket: Bucket, slots: Tensor) -> None:
        """Copies the pieces of all ranks out of ``slots`` (ranks, bytes): at most two copies each.

        Parts of the same size follow each other in the whole tensor, so that the ranks whose piece is complete are one
        strided copy; the first incomplete piece is the last that holds anything.
        """
        for piece in bucket.pieces:
            flat, part = self._flat[piece.tensor], self._plan.manifest[piece.tensor].part(0, self._plan.num_ranks)[1]
            complete = max(0, flat.numel() - piece.start - piece.length + part) // part
            target = flat.as_strided((complete, piece.length), (part, 1), flat.storage_offset() + piece.start)
            target.copy_(_in_slot(slots[:complete], piece, piece.length, self._plan))
            if complete < self._plan.num_ranks:
                begin, end = self._plan.extent(piece, complete)
                flat[begin:end].copy_(_in_slot(slots[complete], piece, end - begin, self._plan))

    def checksums(self) -> Tensor:
        """(ranks, P) int64 of what the engine holds now, by the rank that it came from."""
        return checksum_spans(self._flat, self._plan.spans()).view(self._plan.num_ranks, -1)


class Buffers:
    """Memory of two buckets, so that one is exchanged while the other is copied out."""

    def __init__(self, plan: BucketPlan, device: torch.device) -> None:
        self._plan = plan
        self._memory = [torch.empty(plan.largest_bytes, dtype=torch.uint8, device=device) for _ in plan.buckets[:2]]

    def slots(self, bucket: Bucket) -> Tensor:
        """(ranks, bytes)."""
        memory = self._memory[bucket.index % len(self._memory)]
        return memory[: self._plan.num_ranks * bucket.slot_bytes].view(self._plan.num_ranks, bucket.slot_bytes)


def stream(
    plan: BucketPlan,
    buffers: Buffers,
    exchange: Exchange,
    times: PartTimes,
    *,
    outgoing: Outgoing | None = None,
    incoming: Incoming | None = None,
) -> None:
    """Moves all buckets; while one is under way the one before it is copied out."""
    under_way: tuple[Bucket, Tensor, list[dist.Work]] | None = None
    for bucket in (*plan.buckets, None):
        arrived, under_way = under_way, None
        if bucket is not None:
            slots = buffers.slots(bucket)
            if outgoing is not None:
                with times.part("cast"):
                    outgoing.cast(bucket, slots[outgoing.rank])
            under_way = bucket, slots, exchange(slots)
        if arrived is not None:
            with times.part("gather"):
                finish(arrived[2])
            if incoming is not None:
                with times.part("copy"):
                    incoming.put_slots(*arrived[:2])


def table(own: Tensor, rank: int, num_ranks: int) -> Tensor:
    """(num_ranks, P) with ``own`` (P,) as the row of ``rank``, to be exchanged."""
    rows = own.new_zeros((num_ranks, own.numel()))
    rows[rank] = own
    return rows


def finish(works: Iterable[dist.Work]) -> None:
    """On CUDA only the stream waits."""
    for work in works:
        work.wait()


def verdict(sent: Tensor, held: Tensor) -> Tensor:
    """(4,) int64: how many checksums (ranks, P) differ, the number of the first, and its two values."""
    different = (sent != held).view(-1)
    first = different.int().argmax()
    return torch.stack([different.sum(), first, sent.take(first), held.take(first)])  # indexing would wait for first


def raise_first_difference(
    verdicts: Tensor, version: int, plan: BucketPlan, peers: Peers, senders: Sequence[int]
) -> None:
    """Reads everyone's verdict (ranks, 4), which is the one time that the host waits for the device.

    Raises WeightSyncError naming the first difference.
    """
    found = verdicts.tolist()
    receiver = next((rank for rank, (count, *_) in enumerate(found) if count), None)
    if receiver is None:
        return
    _, first, sent, held = found[receiver]
    sender, piece = divmod(first, plan.num_pieces)
    bucket, where = plan.bucket_of(piece)
    difference = Difference(
        tensor=plan.manifest[where.tensor].name,
        bucket=bucket.index,
        sender=senders[sender],
        receiver=peers.global_rank(receiver),
        sent=sent,
        held=held,
        num_more=sum(count for count, *_ in found) - 1,
    )
    raise WeightSyncError.of(version, difference, peers.size)
