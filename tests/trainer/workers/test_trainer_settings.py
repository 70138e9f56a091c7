"""A key of the actor's or the engine's section reaches every actor and every engine without being spelled again."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from vexact.config import Config
from vexact.config.sections.actor import ActorSettings, OptimSettings
from vexact.config.sections.engine import EngineSettings
from vexact.rollout import EngineConfig
from vexact.trainer.workers import actor_config, engine_settings

OTHER: dict[str, Any] = {
    "attn_impl": "sdpa",
    "async_scheduling": True,
    "num_pages": 7,
    "kv_cache_bytes": 1 << 20,
    "max_model_len": 99,
    "cudagraph_capture_sizes": (1, 3),
    "gpu_memory_utilization": 0.25,
    "loss_agg_mode": "seq-mean-token-sum",
    "kl_loss_type": "k2",
    "lr_scheduler_type": "cosine",
    "betas": (0.8, 0.9),
    "lr_warmup_steps_ratio": 0.5,
    "min_lr_ratio": 0.5,
}


def another(value: Any, name: str) -> Any:
    if name in OTHER:
        return OTHER[name]
    return not value if isinstance(value, bool) else value * 2 + 1


def config(section: str, **values: Any) -> Config:
    whole = Config()
    changed = replace(getattr(whole.actor_rollout_ref, section), **values)
    return replace(whole, actor_rollout_ref=replace(whole.actor_rollout_ref, **{section: changed}))


@pytest.mark.parametrize("name", [item.name for item in fields(EngineSettings)])
def test_every_engine_key_arrives(name: str) -> None:
    value = another(getattr(Config().rollout, name), name)
    assert getattr(EngineConfig(**engine_settings(config("rollout", **{name: value}))), name) == value


@pytest.mark.parametrize("name", [item.name for item in fields(ActorSettings)])
def test_every_actor_key_arrives(name: str) -> None:
    value = another(getattr(Config().actor, name), name)
    assert getattr(actor_config(config("actor", **{name: value}), torch.device("cpu"), 5), name) == value


@pytest.mark.parametrize("name", [item.name for item in fields(OptimSettings)])
def test_every_optimizer_key_arrives(name: str) -> None:
    value = another(getattr(Config().actor.optim, name), name)
    optim = replace(Config().actor.optim, **{name: value})
    assert getattr(actor_config(config("actor", optim=optim), torch.device("cpu"), 5).optim, name) == value
