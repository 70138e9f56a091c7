"""Moving weights from the trainer to the rollout, versioned and verified bit for bit."""

from vexact.weights.fingerprint import checksum
from vexact.weights.sync import WeightSyncError, sync_weights

__all__ = ["WeightSyncError", "checksum", "sync_weights"]
