"""How a model's tensors fill buckets of a fixed size, one equal slot of each bucket per rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vexact.weights.manifest import Manifest

BUCKET_BYTES = 256 * 2**20
ALIGNMENT = 128  # bytes; every piece starts on a whole memory transaction


@dataclass(frozen=True, slots=True)
class Piece:
    """The same stretch of every rank's part of one tensor: elements [start, start + length) of the part.

    The first rank's part has them all; parts of later ranks may end before or within.
    """

    tensor: int  # index in the manifest
    start: int
    length: int
    slot_offset: int  # bytes


@dataclass(frozen=True, slots=True)
class Bucket:
    """One collective: ``slot_bytes`` from every rank."""

    index: int
    pieces: tuple[Piece, ...]
    slot_bytes: int
    first_piece: int  # how many pieces the buckets before it have


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """The same on every rank: a pure function of the manifest, the number of shards and the size of a bucket."""

    manifest: Manifest
    num_ranks: int
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, manifest: Manifest, num_ranks: int, bucket_bytes: int = BUCKET_BYTES) -> BucketPlan:
        """Tensors in order, cut where a bucket is full. Raises ValueError if a rank's slot would hold nothing."""
        slot = bucket_bytes // num_ranks // ALIGNMENT * ALIGNMENT
        if slot < ALIGNMENT:
            raise ValueError(
                f"bucket_bytes={bucket_bytes} leaves each of {num_ranks} ranks less than {ALIGNMENT} bytes; raise it"
            )
        buckets: list[Bucket] = []
        pieces: list[Piece] = []
        used = count = 0

        def close() -> None:
            nonlocal pieces, used, count
            buckets.append(Bucket(len(buckets), tuple(pieces), used, count))
            count += len(pieces)
            pieces, used = [], 0

        for index, spec in enumerate(manifest):
            start, part = 0, spec.part(0, num_ranks)[1]
            while start < part:
                if used == slot:
                    close()
                length = min(part - start, (slot - used) // spec.itemsize)
                pieces.append(Piece(index, start, length, used))
                used += -(-length * spec.itemsize // ALIGNMENT) * ALIGNMENT
                start += length
        if pieces:
            close()
        return cls(manifest, num_ranks, tuple(buckets))

    @property
    def largest_bytes(self) -> int:
        """Of one bucket."""
        return self.num_ranks * max((bucket.slot_bytes for bucket in self.buckets), default=0)

    @property
    def num_pieces(self) -> int:
        return sum(len(bucket.pieces) for bucket in self.buckets)

    @property
    def num_bytes(self) -> int:
        """Of the tensors, without padding."""
        return sum(spec.numel * spec.itemsize for spec in self.manifest)

    def extent(self, piece: Piece, rank: int) -> tuple[int, int]:
        """[begin, end) of a rank's elements of a piece in the whole tensor; empty where its part ends before."""
        begin, end = self.manifest[piece.tensor].part(rank, self.num_ranks)
        return min(end, begin + piece.start), min(end, begin + piece.start + piece.length)

    def spans(self) -> np.ndarray:
        """(num_ranks * num_pieces, 4) int64, rank-major: where the elements of every piece are in the whole tensors.

        The rows are those of ``fingerprint.checksum_spans``.
        """
        rows = [(piece.tensor, piece.start, piece.start + piece.length) for piece in self.pieces()]
        tensor, start, stop = np.array(rows, np.int64).reshape(-1, 3).T  # (P,) each
        parts = [[spec.part(rank, self.num_ranks) for spec in self.manifest] for rank in range(self.num_ranks)]
        begin, end = np.moveaxis(np.array(parts, np.int64).reshape(self.num_ranks, -1, 2)[:, tensor], -1, 0)  # (W, P)
        first, last = np.minimum(end, begin + start), np.minimum(end, begin + stop)
        return np.stack([np.broadcast_to(tensor, first.shape), first, last, first], -1).reshape(-1, 4)

    @property
    def digest(self) -> str:
        """Equal on two ranks that cut the same tensors alike."""
        text = "\n".join([f"{self.num_ranks}", *(str(b.slot_bytes) for b in self.buckets), *map(str, self.manifest)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pieces(self) -> Iterator[Piece]:
        for bucket in self.buckets:
            yield from bucket.pieces

    def bucket_of(self, piece: int) -> tuple[Bucket, Piece]:
        """The bucket that holds the piece with this number, and the piece."""
        bucket = next(b for b in self.buckets if piece < b.first_piece + len(b.pieces))
        return bucket, bucket.pieces[piece - bucket.first_piece]
