"""Moving weights from the trainer to the rollout, versioned and verified bit for bit."""

from vexact.weights.channel import receive_weights, send_weights
from vexact.weights.errors import Difference, WeightSyncError
from vexact.weights.fingerprint import checksum, checksums
from vexact.weights.handover import WeightTaker
from vexact.weights.model_checksums import named_checksums
from vexact.weights.sync import sync_weights

__all__ = [
    "Difference",
    "WeightSyncError",
    "WeightTaker",
    "checksum",
    "checksums",
    "named_checksums",
    "receive_weights",
    "send_weights",
    "sync_weights",
]
