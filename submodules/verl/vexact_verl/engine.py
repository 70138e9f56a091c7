"""``actor.strategy=vexact``: vexact's decoder, sharding, gradient sum and AdamW under verl's trainer and losses.

verl gives every rank sequences of its own. A rank's micro-batches are those that verl makes of them; the gradients of
all ranks are added in one fixed order. The bits of log-probabilities depend on none of this; those of the weights after
an update depend on how verl splits the data, and so on the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import BaseEngine, BaseEngineCtx
from verl.workers.engine.utils import detach_tree, postprocess_batch_func, prepare_micro_batches

from vexact.models.hf_names import to_hf
from vexact.training import Actor
from vexact.training.parallel.ranks import Ranks
from vexact.training.parallel.sharding import load_sharded_model
from vexact.training.passes.forward import token_scores
from vexact.training.state.finite import why_skipped
from vexact_verl.batch import JaggedBatch
from vexact_verl.checkpoint import Checkpoints
from vexact_verl.settings import actor_config, learning_rate

log = logging.getLogger(__name__)
_UNSUPPORTED = ("calculate_sum_pi_squared", "distillation_use_topk", "enable_routing_replay")


class VexactEngine(BaseEngine):
    def __init__(
        self,
        model_config: HFModelConfig,
        engine_config: FSDPEngineConfig,
        optimizer_config: FSDPOptimizerConfig | None,
        checkpoint_config: CheckpointConfig,
    ) -> None:
        """Raises ValueError for settings that could not be honoured."""
        super().__init__()
        self.model_config, self.engine_config, self.checkpoint_config = model_config, engine_config, checkpoint_config
        if engine_config.forward_only:
            optimizer_config = None  # verl gives a reference policy one without a meaning
        self.config = actor_config(model_config, engine_config, optimizer_config, dist.get_world_size())
        self.learning_rate = learning_rate(optimizer_config or FSDPOptimizerConfig())
        self.mode: str | None = None
        self._last_loss = 0.0

    def initialize(self) -> None:
        ranks = Ranks.of_process(torch.device(get_device_id()))
        model = load_sharded_model(self.model_config.local_path, ranks, self.config.torch_dtype)
        self.actor = Actor(model, self.config, ranks.device)
        self.module = self.actor.model
        self._residence = ExitStack()  # holds the weights on the device while verl wants them there
        self._checkpoints = Checkpoints(self.actor, self.model_config, self.checkpoint_config)

    @property
    def is_param_offload_enabled(self) -> bool:
        return self.config.param_offload

    @property
    def is_optimizer_offload_enabled(self) -> bool:
        return self.config.optimizer_offload

    def get_data_parallel_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def train_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _Mode(self, "train", **kwargs)

    def eval_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _Mode(self, "eval", **kwargs)

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """Moves the weights where ``param_offload`` is on. Moments that are offloaded never move as a whole."""
        super().to(device, model, optimizer, grad)
        if model:
            self._residence.close()
            if device == get_device_name():
                self._residence.enter_context(self.actor.resident())

    def optimizer_zero_grad(self) -> None:
        self.actor.gradients.release()

    def optimizer_step(self) -> float:
        """Clips and steps; nothing changes when the norm, which is returned, is not finite."""
        self.actor.optimizer.set_lr(self.learning_rate(self.actor.num_updates))
        norm = self.actor.optimizer.step(self.config.grad_clip)
        if not norm < float("inf"):
            log.warning("the optimizer step was skipped: %s", why_skipped(self._last_loss, self.module))
        return norm

    def lr_scheduler_step(self) -> float:
        self.actor.num_updates += 1
        return self.learning_rate(self.actor.num_updates)

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> dict[str, Any]:
        num_ranks = self.get_data_parallel_size()
        num_tokens = data["loss_mask"].sum().to(get_device_id())
        dist.all_reduce(num_tokens)
        tu.assign_non_tensor(data, sp_size=1, dp_size=num_ranks, batch_num_tokens=num_tokens.item())
        for key in _UNSUPPORTED:
            if tu.get_non_tensor_data(data, key, False):
                raise ValueError(f"{key} is not built into actor.strategy=vexact; turn it off")
        group = self.get_data_parallel_group()
        micro_batches, indices = prepare_micro_batches(data=data, dp_group=group, same_micro_num_in_dp=True)
        if not forward_only:
            self.actor.gradients.start(len(micro_batches) * num_ranks)
        try:
            outputs = [self.forward_step(each, loss_function, forward_only) for each in micro_batches]
        finally:
            if forward_only and isinstance(self.module, FSDPModule):
                self.module.reshard()  # else gathered copies stay in the place of the root's weights
        self._last_loss = sum(output["loss"] for output in outputs)
        return postprocess_batch_func(output_lst=outputs, indices=indices, data=data)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> dict[str, Any]:
        """One micro-batch, its backward included."""
        keep = forward_only or tu.get_non_tensor_data(micro_batch, "return_model_output", False)
        micro_batch = micro_batch.to(get_device_id())
        batch = JaggedBatch(micro_batch, self.actor.ranks.device, every_token=keep and not forward_only)
        if not forward_only:
            self.actor.gradients.next_round()
        with torch.set_grad_enabled(not forward_only):
            scores = token_scores(self.module, batch.packed)
            output = {"log_probs": batch.jagged(scores.logprobs)}
            if tu.get_non_tensor_data(micro_batch, "calculate_entropy", False):
                output["entropy"] = batch.jagged(scores.entropy)
            loss, metrics = torch.ones(()), {}
            if loss_function is not None:
                group = self.get_data_parallel_group()
                loss, metrics = loss_function(model_output=output, data=micro_batch, dp_group=group)
        if not forward_only:
            # verl's losses expect the mean over ranks; vexact's gradient sum is a sum
            loss.backward(torch.full_like(loss, 1 / self.get_data_parallel_size()))
        meta = {"loss": loss.detach().item(), "metrics": metrics}
        return meta | {"model_output": detach_tree(output)} if keep else meta

    def get_per_tensor_param(self, **_: Any) -> tuple[Any, None]:
        """Whole tensors by Hugging Face's names, one at a time, in the dtype that the forward computes in."""
        weights: Iterator[tuple[str, Tensor]] = to_hf(self.module.config, self.actor.named_weights())
        return weights, None

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **_: Any,
    ) -> None:
        self._checkpoints.save(local_path, hdfs_path, global_step, max_ckpt_to_keep)

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False, **_: Any
    ) -> None:
        self._checkpoints.load(local_path, hdfs_path, del_local_after_load)


class _Mode(BaseEngineCtx):
    """verl's modes: weights on the device inside, no gradients left behind."""

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if self.mode == "train" and (self.zero_grad_on_exit or exc_type is not None):
            self.engine.optimizer_zero_grad()
        super().__exit__(exc_type, exc_val, exc_tb)
