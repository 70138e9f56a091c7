"""Going on with a run: from which checkpoint, and whether it still is the same run."""

from vexact.trainer.resume.identity import run_identity, weights_digest
from vexact.trainer.resume.source import ResumeError, Source, check_changes, find_source, note_environment

__all__ = [
    "ResumeError",
    "Source",
    "check_changes",
    "find_source",
    "note_environment",
    "run_identity",
    "weights_digest",
]
