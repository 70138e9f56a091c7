"""Which sample a score was given for: a seal over both, made where the score is and checked where it counts."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from vexact.types import Sample, Score


class SealError(RuntimeError):
    """A score is not the one that was given for the sample it has come to."""


def sample_key(sample: Sample) -> str:
    """A digest of request id and response tokens."""
    digest = blake2b(sample.request_id.encode(), digest_size=16)
    digest.update(b"\0" + array("q", sample.token_ids).tobytes())
    return digest.hexdigest()


def seal(key: str, value: float) -> str:
    """Binds a score to the sample with this key."""
    return blake2b(key.encode() + struct.pack("<d", value), digest_size=16).hexdigest()


def require_seals(samples: Sequence[Sample], scores: Sequence[Score], keys: Sequence[str] | None = None) -> None:
    """
    Args:
        keys: of the samples, if they are known already.

    Raises:
        SealError: scores are missing, or one was given for another sample or had another value.
    """
    if len(samples) != len(scores):
        raise SealError(f"{len(scores)} scores came back for {len(samples)} samples")
    keys = [sample_key(sample) for sample in samples] if keys is None else keys
    for sample, score, key in zip(samples, scores, keys):
        if score.seal == seal(key, score.value):
            continue
        owner = next((other for other, key in zip(samples, keys) if score.seal == seal(key, score.value)), None)
        whose = "was changed after grading, or given for another sample"
        if owner is not None:
            whose = f"was given for request {owner.request_id}"
        raise SealError(f"request {sample.request_id}: its score {score.value!r} {whose}. Nothing was trained on it")
