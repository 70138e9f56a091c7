"""What goes wrong with worker processes."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A worker process died, hung, ran out of memory or met a bug; its group is torn down.

    Attributes:
        rank: the rank that is to blame; None where no single one is.
        stage: what was being done.
        is_bug: the worker raised an error that is not meant for users; its own traceback is ``__cause__``.
        is_fault: a process or a machine failed, and no setting is to blame.
    """

    def __init__(
        self, message: str, rank: int | None = None, stage: str = "", is_bug: bool = False, is_fault: bool = True
    ) -> None:
        super().__init__(message)
        self.rank, self.stage, self.is_bug, self.is_fault = rank, stage, is_bug, is_fault and not is_bug


class ClusterError(RuntimeError):
    """The processes could not be started: no Ray, a cluster that does not answer or is too small, a refused port."""


class WorkerTraceback(Exception):
    """A worker's own traceback as text, which Python prints above the driver's."""

    def __init__(self, text: str) -> None:
        super().__init__(f"\n{text.rstrip()}")
