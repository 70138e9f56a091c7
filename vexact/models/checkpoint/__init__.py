"""Checkpoints on disk: Hugging Face directories, read tensor by tensor and written whole or not at all."""

from vexact.models.checkpoint.reader import CheckpointReader, Shape
from vexact.models.checkpoint.writer import write_checkpoint

__all__ = ["CheckpointReader", "Shape", "write_checkpoint"]
