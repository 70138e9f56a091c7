"""The whole configuration: `Config`, frozen, with the values that follow from several keys."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vexact.config.fields import flatten, section
from vexact.config.sections.actor import ActorSection
from vexact.config.sections.algorithm import AlgorithmSection
from vexact.config.sections.data import DataConfig
from vexact.config.sections.model import ModelSection
from vexact.config.sections.ref import RefSection
from vexact.config.sections.reward import RewardSection
from vexact.config.sections.rollout import RolloutSection
from vexact.config.sections.trainer import TrainerSection


@dataclass(frozen=True)
class ActorRolloutRef:
    model: ModelSection = section(ModelSection, "The checkpoint.")
    actor: ActorSection = section(ActorSection, "The policy update.")
    rollout: RolloutSection = section(RolloutSection, "The sampling engine.")
    ref: RefSection = section(RefSection, "The reference policy.")


@dataclass(frozen=True)
class Keys:
    """Every key there is: the single truth behind validation, the YAML defaults and the documentation."""

    data: DataConfig = section(DataConfig, "Where prompts come from.")
    actor_rollout_ref: ActorRolloutRef = section(ActorRolloutRef, "Model, policy update, rollout, reference.")
    algorithm: AlgorithmSection = section(AlgorithmSection, "Rewards to advantages.")
    reward: RewardSection = section(RewardSection, "Grading.")
    trainer: TrainerSection = section(TrainerSection, "The run.")


@dataclass(frozen=True)
class Config(Keys):
    """A complete configuration.

    ``notices`` are remarks for the user that came up while loading it (moved or unused keys); they are not part of
    the configuration and are not saved.
    """

    notices: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def model(self) -> ModelSection:
        return self.actor_rollout_ref.model

    @property
    def actor(self) -> ActorSection:
        return self.actor_rollout_ref.actor

    @property
    def rollout(self) -> RolloutSection:
        return self.actor_rollout_ref.rollout

    @property
    def ref(self) -> RefSection:
        return self.actor_rollout_ref.ref

    @property
    def sequences_per_step(self) -> int:
        return self.data.train_batch_size * self.rollout.n

    @property
    def mini_batch_prompts(self) -> int:
        """Prompts per optimizer step."""
        return self.actor.ppo_mini_batch_size or self.data.train_batch_size

    @property
    def optimizer_steps_per_rollout(self) -> int:
        return math.ceil(self.data.train_batch_size / self.mini_batch_prompts) * self.actor.ppo_epochs

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response in tokens."""
        return self.rollout.max_model_len or self.data.max_prompt_length + self.data.max_response_length

    @property
    def data_seed(self) -> int:
        return self.trainer.seed if self.data.seed is None else self.data.seed

    @property
    def rollout_seed(self) -> int:
        return self.trainer.seed if self.rollout.seed is None else self.rollout.seed

    @property
    def overlong_length(self) -> int:
        """Tokens of a response at which DAPO's penalty is whole."""
        return self.reward.reward_kwargs.max_resp_len or self.data.max_response_length

    @property
    def needs_reference(self) -> bool:
        """Whether a KL term towards the initial policy is on."""
        return self.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def loss_mode(self) -> str:
        """The policy loss in force."""
        replaced = self.algorithm.bypasses and self.algorithm.rollout_correction.loss_type == "reinforce"
        return "reinforce" if replaced else self.actor.policy_loss.loss_mode

    @property
    def run_dir(self) -> Path:
        if self.trainer.default_local_dir is not None:
            return Path(os.path.expanduser(self.trainer.default_local_dir))
        return Path("runs") / self.trainer.project_name / self.trainer.experiment_name

    def dtype(self, device: str) -> str:
        """The compute type on both sides for ``device`` ("cpu" or "cuda"): "float32", "bfloat16" or "float16"."""
        given = [each for each in (self.rollout.dtype, self.actor.fsdp_config.dtype) if each != "auto"]
        return given[0] if given else "float32" if device.startswith("cpu") else "bfloat16"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML holds them."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(Keys)}

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def changed(self) -> dict[str, Any]:
        """Dotted keys whose value is not the default."""
        defaults = flatten(Config().to_dict())
        return {key: value for key, value in flatten(self.to_dict()).items() if defaults.get(key) != value}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value
