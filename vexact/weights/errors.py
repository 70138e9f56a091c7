"""What can go wrong between a trainer and a rollout that both are well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """A stretch of a tensor whose bits are not those that were sent."""

    tensor: str
    bucket: int
    sender: int  # rank that holds these rows
    receiver: int  # rank whose copy differs
    sent: int
    held: int
    num_more: int  # further stretches, of all receivers


class WeightSyncError(RuntimeError):
    """A rollout does not hold the bits that the trainer sent, or a rank could not take part.

    ``difference`` says which bits; None when nothing was sent.
    """

    def __init__(self, message: str, difference: Difference | None = None) -> None:
        super().__init__(message)
        self.difference = difference

    @classmethod
    def of(cls, version: int, found: Difference, num_ranks: int) -> WeightSyncError:
        where, receiver, sender = f"bucket {found.bucket}", "the rollout", "the trainer"
        if num_ranks > 1:
            where += f", rows of rank {found.sender}"
            receiver, sender = f"the rollout of rank {found.receiver}", f"rank {found.sender}"
        more = f" ({found.num_more} more stretches differ)" if found.num_more else ""
        return cls(
            f"weights version {version}: {found.tensor} ({where}) has checksum {found.held} in {receiver}, {sender} "
            f"sent {found.sent}{more}; its samples would not be the trainer's",
            found,
        )
