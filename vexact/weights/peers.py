"""The ranks that move weights together: they begin together or not at all, and hear one verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from vexact.weights.errors import WeightSyncError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks of one process group; a lone process has none."""

    group: dist.ProcessGroup | None

    @classmethod
    def sharing(cls, mesh: DeviceMesh | None) -> Peers:
        """The ranks of a mesh of one dimension."""
        return cls(None if mesh is None else mesh.get_group())

    @classmethod
    def spanning(cls, group: dist.ProcessGroup | None) -> Peers:
        """``group``, or the default group. Raises ValueError if there is none."""
        if not dist.is_initialized():
            raise ValueError("weights travel between processes over a process group; start torch.distributed first")
        return cls(dist.group.WORLD if group is None else group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def global_ranks(self) -> list[int]:
        return [self.global_rank(rank) for rank in range(self.size)]

    def global_rank(self, rank: int) -> int:
        """The rank in the default group of ``rank`` in this one."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def gathered(self, values: Tensor) -> Tensor:
        """Everyone's ``values`` (n,), of one dtype, on every rank: (size, n)."""
        if self.group is None:
            return values.unsqueeze(0)
        rows = values.new_empty((self.size, values.numel()))
        rows[self.rank] = values
        self.gather(rows).wait()
        return rows

    def gather(self, rows: Tensor) -> dist.Work:
        """Starts to fill ``rows`` (size, n), of which every rank has its own, with those of all."""
        # the newer name is torch 2.13's, which warns about the older one
        start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work: dist.Work = start(rows.view(-1), rows[self.rank], group=self.group, async_op=True)
        return work

    def begin(self, version: int, prepare: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
        """Runs ``prepare() -> (result, facts)`` on every rank; returns this rank's result and the facts of all.

        Raises:
            Exception: what ``prepare`` raised here.
            WeightSyncError: it raised on another rank, which is named, or another rank moves another version.
        """
        if self.group is None:
            result, facts = prepare()
            return result, [facts]
        try:
            result, facts = prepare()
        except Exception as error:
            self._reports((version, f"{type(error).__name__}: {error}", None))
            raise
        reports = self._reports((version, None, facts))
        for rank, (other, problem, _) in enumerate(reports):
            if problem is not None:
                raise WeightSyncError(
                    f"weights version {version}: rank {self.global_rank(rank)} could not begin: {problem}"
                )
            if other != version:
                raise WeightSyncError(
                    f"weights version {version}: rank {self.global_rank(rank)} moves version {other}; every rank must "
                    "call for the same one"
                )
        return result, [facts for _, _, facts in reports]

    def _reports(self, own: tuple[int, str | None, Any]) -> list[Any]:
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, own, group=self.group)
        return reports

    def require_equal(self, version: int, facts: list[Any], what: str) -> None:
        """Raises WeightSyncError naming two ranks whose ``facts`` differ."""
        for rank, other in enumerate(facts):
            if other != facts[0]:
                first, second = self.global_rank(0), self.global_rank(rank)
                raise WeightSyncError(f"weights version {version}: ranks {first} and {second} have different {what}")
