"""Checkpoints of a run: written whole or not at all by any number of ranks, read back bit for bit by any other."""

from vexact.trainer.checkpoint.best import BestMetricError, BestPointer
from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.progress import Progress
from vexact.trainer.checkpoint.read import load_checkpoint, read_identity, restore, verify_checkpoint
from vexact.trainer.checkpoint.saver import Saver, ShardGroup
from vexact.trainer.checkpoint.shard_files import Written
from vexact.trainer.checkpoint.shard_writer import ShardWriter
from vexact.trainer.checkpoint.store import CheckpointStore

__all__ = [
    "BestMetricError",
    "BestPointer",
    "CheckpointError",
    "CheckpointStore",
    "Progress",
    "Saver",
    "ShardGroup",
    "ShardWriter",
    "Written",
    "load_checkpoint",
    "read_identity",
    "restore",
    "verify_checkpoint",
]
