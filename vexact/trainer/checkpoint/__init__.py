"""Checkpoints of a run: written whole or not at all, read back bit for bit."""

from vexact.trainer.checkpoint.store import CheckpointError, CheckpointStore, Progress, load_checkpoint

__all__ = ["CheckpointError", "CheckpointStore", "Progress", "load_checkpoint"]
