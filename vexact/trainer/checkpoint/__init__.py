"""Checkpoints of a run: written whole or not at all, read back bit for bit."""

from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.read import load_checkpoint, read_identity, verify_checkpoint
from vexact.trainer.checkpoint.state_file import Progress
from vexact.trainer.checkpoint.store import CheckpointStore

__all__ = ["CheckpointError", "CheckpointStore", "Progress", "load_checkpoint", "read_identity", "verify_checkpoint"]
