"""What the loop works with: engine, actor, reference, graders; in one process or in one per GPU."""

from vexact.trainer.workers.build import Workers, build_workers
from vexact.trainer.workers.groups import EngineGroup, PendingSamples
from vexact.trainer.workers.inputs import (
    Inputs,
    first_rows,
    load_dataset,
    load_inputs,
    load_tokenizer,
    num_steps,
    start_rewards,
)
from vexact.trainer.workers.roles import Roles, roles_of
from vexact.trainer.workers.settings import actor_config, engine_settings

__all__ = [
    "EngineGroup",
    "Inputs",
    "PendingSamples",
    "Roles",
    "Workers",
    "actor_config",
    "build_workers",
    "engine_settings",
    "first_rows",
    "load_dataset",
    "load_inputs",
    "load_tokenizer",
    "num_steps",
    "roles_of",
    "start_rewards",
]
