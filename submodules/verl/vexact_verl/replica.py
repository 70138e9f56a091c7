"""verl's handle on one rollout: starts the server beside the worker whose GPU it uses."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.utils.device import get_device_name, get_resource_name
from verl.workers.config import RolloutConfig
from verl.workers.rollout.replica import RolloutReplica

from vexact_verl.server import VexactServer


class VexactReplica(RolloutReplica):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for a rollout on several GPUs, and for reward and teacher models."""
        super().__init__(*args, **kwargs)
        require_one_gpu(self.config)
        if self.is_reward_model or self.is_teacher_model:
            raise ValueError(
                "rollout.name=vexact generates samples of the policy; serve other models with vllm or sglang"
            )

    async def launch_servers(self) -> None:
        node, device = await self.workers[0].__ray_call__.remote(_place)
        platform = get_platform()
        environment = dict.fromkeys(platform.ray_noset_envvars(), "1")  # else Ray hides all GPUs from the server
        environment |= {platform.visible_devices_envvar(): device, **platform.rollout_env_vars()}
        server = (
            ray.remote(VexactServer)
            .options(
                name=server_name(self.replica_rank) + self.name_suffix,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
                runtime_env={"env_vars": environment},
                max_concurrency=self.max_concurrency,
            )
            .remote(self.config, _plain(self.model_config), get_device_name(), self.rollout_mode)
        )
        await server.ready.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = f"{server_name(self.replica_rank)}{self.name_suffix}"  # only ever a key


def server_name(replica_rank: int) -> str:
    """Of the Ray actor that serves a replica."""
    return f"vexact_server_{replica_rank}_0"


def require_one_gpu(config: RolloutConfig) -> None:
    """Raises ValueError naming the key that asks for more."""
    for key in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        if getattr(config, key) != 1:
            raise ValueError(
                f"rollout.{key}={getattr(config, key)}: an engine runs on one GPU, and every GPU gets one; use 1"
            )


def _place(_: Any) -> tuple[str, str]:
    """Node and device of the worker in whose process this runs."""
    context = ray.get_runtime_context()
    devices = context.get_accelerator_ids().get(get_resource_name(), [])
    return context.get_node_id(), str(devices[0]) if devices else ""


def _plain(model: Any) -> dict[str, Any]:
    """What the server needs to know of ``actor_rollout_ref.model``."""
    return {"path": model["path"], "use_shm": bool(model.get("use_shm", False))}
