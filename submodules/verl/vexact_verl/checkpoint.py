"""verl's checkpoint directory with vexact's state in it: one safetensors file per rank, read on any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from verl.trainer.config import CheckpointConfig
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
from verl.workers.config import HFModelConfig

from vexact.models import save_hf
from vexact.trainer.checkpoint.shard_files import FOLDER
from vexact.trainer.checkpoint.shard_reader import ShardedState
from vexact.trainer.checkpoint.shard_writer import ShardWriter
from vexact.training import Actor

HF_FOLDER = "huggingface"  # verl's name
_MOMENTS = ("exp_avg.", "exp_avg_sq.", "num_steps.")


class Checkpoints:
    """Saves and loads; all ranks make the same calls. verl's tracker file, written last, says which one is whole."""

    def __init__(self, actor: Actor, model: HFModelConfig, config: CheckpointConfig) -> None:
        """Raises ValueError for contents that would leave out the model."""
        self._actor, self._model = actor, model
        self._kept = BaseCheckpointManager(None, None, checkpoint_config=config)  # type: ignore[arg-type]
        if not (self._kept.should_save_model and self._kept.should_load_model):
            raise ValueError("actor.checkpoint.save_contents and load_contents must name `model`")
        if config.async_save:
            raise ValueError("actor.checkpoint.async_save=True is not built in; use False")
        ranks = actor.ranks
        self._writer = ShardWriter(self._state, ranks.rank, ranks.world_size)

    def save(self, local_path: str, hdfs_path: str | None, step: int, max_to_keep: Any) -> None:
        """Raises ValueError for a path on HDFS; CheckpointError when the disk is full or the state not finite."""
        _require_local(hdfs_path)
        directory, ranks = Path(local_path), self._actor.ranks
        with ranks.together():
            if ranks.is_first:
                self._kept.ensure_checkpoint_capacity(max_to_keep)
            (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        with ranks.together(), self._actor.resident():
            self._writer.save(step, directory / FOLDER)
        if self._kept.should_save_hf_model:
            self._save_weights(directory / HF_FOLDER)
        with ranks.together():
            if ranks.is_first:
                self._save_description(directory / HF_FOLDER)
                self._kept.register_checkpoint(local_path, max_to_keep)

    def load(self, local_path: str, hdfs_path: str | None, delete: bool) -> None:
        """Raises ValueError for a path on HDFS or a state of another model; CheckpointError for a damaged one."""
        _require_local(hdfs_path)
        directory, ranks = Path(local_path) / FOLDER, self._actor.ranks
        with ranks.together():
            if not directory.is_dir():
                raise ValueError(f"{directory} is missing; only checkpoints of actor.strategy=vexact can be loaded")
            stored = ShardedState(directory)
        moments = stored.has_moments and self._kept.should_load_optimizer
        blank = self._actor.blank_state(moments)
        with ranks.together():
            state = stored.read_into(blank)
        self._actor.load_sharded_state(state if moments else _without_moments(state))
        if delete:
            dist.barrier()
            if ranks.is_first:
                shutil.rmtree(local_path)

    def _state(self) -> dict[str, Tensor]:
        state = self._actor.sharded_state()
        return state if self._kept.should_save_optimizer else _without_moments(state)

    def _save_weights(self, directory: Path) -> None:
        """All ranks gather them together; the first one writes."""
        weights = self._actor.named_weights()
        if self._actor.ranks.is_first:
            save_hf(weights, self._actor.model.config, directory)
        else:
            for _ in weights:
                pass

    def _save_description(self, directory: Path) -> None:
        """Configuration and tokenizer, which verl's tools look for."""
        directory.mkdir(exist_ok=True)
        if not self._kept.should_save_hf_model:
            self._model.hf_config.save_pretrained(directory)
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(directory)
        if (processor := self._model.get_processor()) is not None:
            processor.save_pretrained(directory)


def _without_moments(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(_MOMENTS)}


def _require_local(hdfs_path: str | None) -> None:
    if hdfs_path is not None:
        raise ValueError(
            f"checkpoints go to a local or shared directory, not to {hdfs_path}; set default_hdfs_dir=null"
        )
