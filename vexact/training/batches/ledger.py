"""What the loss must read for every sequence: checksums taken where advantages are made, compared where they are used.

Between the two lie packing, shuffles, mini-batches and other processes. A checksum adds up, modulo 2^64, a hash of
(column, position in the response, 32 bits of the value). Integer sums have no order, so host and device agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vexact.training.batches.batch import PolicyTargets
from vexact.training.batches.packing import pack
from vexact.types import TrainSequence

_COLUMNS = ("response tokens", "old log-probabilities", "advantages", "reference log-probabilities")
_CHUNK = 16384  # tokens hashed at a time: their 64-bit values stay in a processor's cache
_FIRST, _SECOND = -7046029254386353131, -4658895280553007687  # odd, hence invertible modulo 2^64


class LedgerError(RuntimeError):
    """The loss would have read other numbers than were computed for a sample; no optimizer step has used them."""


class Ledger:
    """The checksums of N sequences, in the order in which the actor is to get them."""

    def __init__(self, sequences: Sequence[TrainSequence]) -> None:
        self.request_ids = [sequence.sample.request_id for sequence in sequences]
        lengths = [len(sequence.sample.token_ids) for sequence in sequences]
        chunks = [[sequences[i] for i in group] for group in pack(lengths, max([_CHUNK, *lengths]))]
        empty = torch.empty(len(_COLUMNS), 0, dtype=torch.int64)
        self._sums = torch.cat([empty, *map(_host_checksums, chunks)], dim=1)  # (columns, N)

    @property
    def fingerprint(self) -> int:
        """64 bits (signed) by which ranks tell that they were given the same sequences with the same numbers."""
        return int((self._sums * (2 * torch.arange(self._sums.shape[1]) + 1)).sum())

    def require(self, sequences: Sequence[TrainSequence]) -> None:
        """
        Raises:
            LedgerError: these are not the sequences of this ledger, in its order.
        """
        got = [sequence.sample.request_id for sequence in sequences]
        if got == self.request_ids:
            return
        missing = sorted(set(self.request_ids) - set(got)) or sorted(set(got) - set(self.request_ids))
        which = next((i for i, pair in enumerate(zip(got, self.request_ids)) if pair[0] != pair[1]), 0)
        raise LedgerError(
            f"advantages were computed for {len(self.request_ids)} samples and {len(got)} came to the update: "
            + (f"request {missing[0]} is only on one side" if missing else f"request {got[which]} came out of order")
        )

    def require_each_once(self, indices: Sequence[int], used: Sequence[int]) -> None:
        """
        Raises:
            LedgerError: cutting ``indices`` into batches has lost or repeated some of them.
        """
        wrong = Counter(indices)
        wrong.subtract(used)
        for index, count in wrong.items():
            if count:
                name = self.request_ids[index]
                raise LedgerError(f"request {name} is {'missing from' if count > 0 else 'repeated in'} its batches")

    def compare(self, indices: Sequence[int], read: Tensor) -> None:
        """
        Args:
            indices: of B sequences.
            read: (columns, B) int64, the checksums of what the loss reads for them.

        Raises:
            LedgerError: one of them is not what it should be.
        """
        expected = self._sums[: len(read), list(indices)]
        if torch.equal(expected, read):
            return
        at, column = (expected != read).T.nonzero()[0].tolist()
        owner = (self._sums[column] == read[column, at]).nonzero().flatten().tolist()
        whose = f"those of request {self.request_ids[owner[0]]}" if owner else "and of no other sample either"
        raise LedgerError(
            f"request {self.request_ids[indices[at]]}: the {_COLUMNS[column]} that the loss reads are not the ones "
            f"computed for it ({whose}). Something between the scores and the loss mixes up or changes samples; no "
            "optimizer step has used them"
        )


def checksums(token_ids: Tensor, targets: PolicyTargets, lengths: Tensor) -> Tensor:
    """(columns, B) int64 of packed tensors, on their device and without waiting for it.

    Args:
        token_ids: (R,) int64, the response tokens. lengths: (B,) int64 response lengths, R in all.
    """
    values = (targets.old_logprobs, targets.advantages, targets.ref_logprobs)
    bits = torch.stack([token_ids, *(column.view(torch.int32).long() for column in values if column is not None)])
    ends = lengths.cumsum(0)
    starts = ends - lengths
    position = torch.arange(len(token_ids), device=token_ids.device)
    position -= torch.repeat_interleave(starts, lengths, output_size=len(token_ids))
    column = torch.arange(len(bits), device=token_ids.device).unsqueeze(1)
    hashed = (bits + (position * len(_COLUMNS) + column) * _FIRST) * _SECOND
    hashed = (hashed ^ (hashed >> 29)) * _FIRST
    sums = torch.nn.functional.pad((hashed ^ (hashed >> 32)).cumsum(1), (1, 0))
    return sums[:, ends] - sums[:, starts]


def _host_checksums(sequences: Sequence[TrainSequence]) -> Tensor:
    def packed(arrays: Sequence[object], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(array, dtype) for array in arrays]))

    lengths = [len(s.sample.token_ids) for s in sequences]
    nothing = [np.zeros(length) for length in lengths]
    references = [zero if s.ref_logprobs is None else s.ref_logprobs for s, zero in zip(sequences, nothing)]
    targets = PolicyTargets(
        old_logprobs=packed([s.old_logprobs for s in sequences], np.float32),
        advantages=packed([s.advantages for s in sequences], np.float32),
        ref_logprobs=packed(references, np.float32),
    )
    return checksums(packed([s.sample.token_ids for s in sequences], np.int64), targets, torch.tensor(lengths))
