"""verl's own configuration, whole: no key is unknown, and what it asks for that we have not is refused by name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from vexact.config import ConfigError, load_config


def test_verls_whole_configuration_is_a_recipe() -> None:
    spec = find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations
    whole = Path(spec.submodule_search_locations[0]) / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config([f"recipe={whole}"], checked=False)
    refused = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in refused] == ["actor_rollout_ref.rollout.tensor_model_parallel_size"]
    overrides = [f"recipe={whole}", "actor_rollout_ref.rollout.tensor_model_parallel_size=1"]
    with pytest.raises(ConfigError, match="adv_estimator=gae: not supported: GAE needs a critic"):
        load_config(overrides, checked=False)
    config = load_config([*overrides, "algorithm.adv_estimator=grpo"], checked=False)
    assert (config.data.train_batch_size, config.actor.ppo_mini_batch_size, config.actor.optim.lr) == (1024, 256, 1e-6)
