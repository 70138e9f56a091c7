"""The rollout as a training worker sees it: it sends weights to the server beside it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
import torch
from torch import Tensor
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.utils import ensure_async_iterator

from vexact.rollout.loading import DTYPES
from vexact_verl.draws import expect_thresholds
from vexact_verl.parcels import Parcel
from vexact_verl.replica import require_one_gpu, server_name


class VexactAdapter(BaseRollout):
    """One per replica, so each is its own leader."""

    is_leader_rank = True

    def __init__(
        self,
        config: RolloutConfig,
        model_config: HFModelConfig,
        device_mesh: Any,
        replica_rank: int = -1,
        **_: Any,
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        require_one_gpu(self.config)
        if self.config.dtype not in DTYPES:
            raise ValueError(f"rollout.dtype={self.config.dtype!r} must be one of {', '.join(DTYPES)}")
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self._dtype = DTYPES[self.config.dtype]
        self._server: Any = None
        expect_thresholds(self.config)

    @property
    def server(self) -> Any:
        if self._server is None:  # it is started after the worker
            self._server = ray.get_actor(server_name(self.replica_rank))
        return self._server

    async def resume(self, tags: Sequence[str]) -> None:
        """The key-value cache comes back; weights that went away come with ``update_weights``."""
        await self.server.wake_up.remote(tags=list(tags))

    async def release(self) -> None:
        await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(  # type: ignore[override]
        self, weights: Any, global_steps: int | None = None, wire_format: str = "named_tensors", **kwargs: Any
    ) -> None:
        """Sends whole tensors by Hugging Face's names, in ``rollout.dtype``.

        Raises:
            ValueError: weights in another form, or computed with in a narrower dtype than the rollout would.
        """
        if wire_format != "named_tensors" or kwargs.get("peft_config") is not None:
            form = "LoRA adapters" if kwargs.get("peft_config") is not None else f"wire_format={wire_format}"
            raise ValueError(f"rollout.name=vexact takes whole tensors, not {form}")
        await self.server.begin_update.remote(global_steps or 0)
        async for bucket in self._buckets(weights):
            await self.server.receive.remote([Parcel.of(name, tensor) for name, tensor in bucket])
        await self.server.finish_update.remote()

    async def _buckets(self, weights: Any) -> AsyncIterator[list[tuple[str, Tensor]]]:
        """Tensors that stay alive until the server has answered, at least one at a time."""
        room = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        bucket: list[tuple[str, Tensor]] = []
        used = 0
        async for name, tensor in ensure_async_iterator(weights):
            cast = self._cast(name, tensor)
            if bucket and used + cast.nbytes > room:
                yield bucket
                bucket, used = [], 0
            bucket.append((name, cast))
            used += cast.nbytes
        yield bucket

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        if torch.finfo(tensor.dtype).bits < torch.finfo(self._dtype).bits:
            raise ValueError(
                f"{name} comes in {tensor.dtype}, which the trainer computes in, but rollout.dtype="
                f"{self.config.dtype}; set rollout.dtype to the trainer's fsdp_config.mixed_precision.param_dtype"
            )
        return tensor.detach().to(self._dtype)
