"""The training ranks as the actor sees them; with one rank every method is the identity."""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vexact.models import ModelConfig
from vexact.training.batches.packing import BUDGET_KEY
from vexact.training.parallel.sequence_parallel import KEY as SHARING_KEY
from vexact.training.parallel.sequence_parallel import SequenceRanks, check_size

T = TypeVar("T")
_REPORT_BYTES = 512


class PeerStopped(RuntimeError):
    """Another rank refused what all ranks were about to do, so this one has not done it either."""

    is_consequence = True

    def __init__(self, rank: int, reason: str) -> None:
        """``rank`` counts in the default process group; ``reason`` is its error, cut to half a kilobyte."""
        super().__init__(f"rank {rank} stopped before the weights were touched: {reason}")
        self.rank, self.reason = rank, reason

    def __reduce__(self) -> tuple[type[PeerStopped], tuple[int, str]]:
        return PeerStopped, (self.rank, self.reason)


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank per process. ``mesh`` is None for a lone one, ``group`` when there is no group at all.

    Weights are sharded over all ranks. Those of a ``sequence`` compute each micro-batch together.
    """

    mesh: DeviceMesh | None
    device: torch.device
    group: dist.ProcessGroup | None = None
    sequence: SequenceRanks | None = None

    @classmethod
    def of_process(cls, device: torch.device, group: dist.ProcessGroup | None = None) -> Ranks:
        """The ranks of ``group``, by default of the default process group, or this process alone without one."""
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if group is None or group.size() == 1:
            return cls(None, device, group)
        return cls(DeviceMesh.from_group(group, device.type), device, group)

    def sharing(self, size: int, model: ModelConfig) -> Ranks:
        """These ranks, ``size`` neighbours to a micro-batch. All ranks call it together.

        Raises ValueError when ``size`` divides the ranks or the query heads of the model not evenly.
        """
        check_size(size, self.world_size, model.num_heads)
        return self if size == 1 else replace(self, sequence=SequenceRanks.of_process(size, self.group))

    @property
    def per_batch(self) -> int:
        """Ranks that compute a micro-batch together."""
        return 1 if self.sequence is None else self.sequence.size

    @property
    def world_size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def rank(self) -> int:
        """From 0, in the group."""
        return 0 if self.mesh is None or self.group is None else self.group.rank()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, groups: Sequence[list[int]]) -> list[list[int]]:
        """What this rank computes of all micro-batches: number i falls to rank i mod W, in round i div W.

        As many on every rank: where others have one more, an empty group stands at the end. Ranks that compute
        micro-batches together count as one.
        """
        rounds = range(self.rank // self.per_batch, -(-len(groups) // self.at_once) * self.at_once, self.at_once)
        return [groups[i] if i < len(groups) else [] for i in rounds]

    @property
    def at_once(self) -> int:
        """Micro-batches in a round."""
        return self.world_size // self.per_batch

    @property
    def budget_key(self) -> str:
        """What sets the token budget of a micro-batch, for messages."""
        return BUDGET_KEY if self.sequence is None else f"{BUDGET_KEY} x {SHARING_KEY}"

    def reported(self, groups: Sequence[list[int]]) -> Sequence[list[int]]:
        """Those of this rank's micro-batches whose scores it reports: where ranks share them, one of these does."""
        return groups if self.sequence is None or self.sequence.rank == 0 else []

    def gather(self, values: Tensor) -> Tensor:
        """Tensors of one shape and dtype: (...) of every rank -> (W, ...)."""
        if self.mesh is None:
            return values.unsqueeze(0)
        gathered = values.new_empty(self.world_size, *values.shape)
        dist.all_gather(list(gathered), values.contiguous(), group=self.group)
        return gathered

    def by_micro_batch(self, values: Tensor, count: int) -> Tensor:
        """Rows of every rank, one per round, (rounds, ...) -> those of micro-batches 0 to ``count`` - 1 in order."""
        return self.gather(values)[:: self.per_batch].transpose(0, 1).flatten(0, 1)[:count]

    def add_bits(self, values: Tensor) -> Tensor:
        """The sum of integers over the ranks, in place; also joins what other ranks leave 0."""
        if self.mesh is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0, device=self.device)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stretch without collectives that all ranks leave in the same way.

        Raises:
            PeerStopped: the stretch went well here, but not on another rank. That one raises its own error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.mesh is not None:
            reports = self.gather(_encoded(error).to(self.device)).cpu()
            failed = reports.any(1).nonzero().flatten().tolist()
            if error is None and failed:
                assert self.group is not None, "several ranks are a group"
                raise PeerStopped(dist.get_global_rank(self.group, failed[0]), _decoded(reports[failed[0]]))
        if error is not None:
            raise error

    def require_equal(self, what: str, fingerprint: int) -> None:
        """
        Raises:
            ValueError: on every rank, when ``fingerprint`` (int64) is another one on some of them.
        """
        if self.mesh is None:
            return
        seen = self.gather(torch.tensor(fingerprint, dtype=torch.int64, device=self.device)).tolist()
        other = next((rank for rank, value in enumerate(seen) if value != seen[0]), None)
        if other is not None:
            raise ValueError(f"ranks 0 and {other} of the trainer got different {what}; give every rank the same list")

    def sharded(self, local: Tensor, like: Tensor) -> Tensor:
        """``local``, rows laid out as those of ``like``, as a tensor of all ranks: a DTensor when ``like`` is one.

        On the host it belongs to a mesh of the host.
        """
        if not isinstance(like, DTensor):
            return local
        mesh = like.device_mesh
        if local.device.type != mesh.device_type:
            mesh = DeviceMesh.from_group(mesh.get_group(), local.device.type)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())


def lone_mesh(ranks: Ranks) -> DeviceMesh:
    """A mesh of this process only, starting a process group in memory when there is none: no port, no file."""
    group, device = ranks.group, ranks.device
    if group is None and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(close_process_group)
    group = dist.group.WORLD if group is None else group
    assert group is not None, "there is one by now"
    return DeviceMesh.from_group(group, device.type)


def close_process_group() -> None:
    """Ends the default process group if there is one; NCCL complains when a process exits without."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_row(num_rows: int, ranks: Ranks) -> int:
    """Where this rank's rows of a sharded tensor begin: every rank has ceil(n / W), the last ones fewer or none."""
    return min(num_rows, ranks.rank * -(-num_rows // ranks.world_size))


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, any other tensor as it is; they share memory."""
    whole: Any = tensor.detach()
    rows: Tensor = whole.to_local() if isinstance(whole, DTensor) else whole
    return rows


def unsharded(tensor: Tensor) -> Tensor:
    """The whole tensor: gathered from all ranks when sharded, itself otherwise."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _encoded(error: Exception | None) -> Tensor:
    """A report of one size: empty, or what went wrong."""
    text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:_REPORT_BYTES]
    return torch.tensor(list(text.ljust(_REPORT_BYTES, b"\0")), dtype=torch.uint8)


def _decoded(report: Tensor) -> str:
    return bytes(report.tolist()).rstrip(b"\0").decode(errors="ignore")
