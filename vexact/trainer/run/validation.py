"""Where a look at a trained run is kept that is no validation of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from itertools import count
from typing import Any

from vexact.config import Config
from vexact.trainer.resume.settings import validation_settings

log = logging.getLogger(__name__)
FOLDER = "validations"


def place_validation(config: Config, trained: Mapping[str, Any], step: int) -> Config:
    """``config`` with the directory that a validation of the run at ``step`` writes to: the run's own, or, where its
    values would not be those of the run's validations, one below it, so that the run keeps what it has.

    Args:
        trained: the run's own configuration, nested.
    """
    own, asked = validation_settings(trained), validation_settings(config.to_dict())
    changed = [f"{key}={asked[key]} (was {own[key]})" for key in asked if key in own and asked[key] != own[key]]
    if not changed:
        return config
    names = (f"step_{step}{f'.{number}' if number else ''}" for number in count())
    place = next(path for name in names if not (path := config.run_dir / FOLDER / name).exists())
    log.info("a validation under other settings than the run's is kept in %s: %s", place, ", ".join(changed))
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, default_local_dir=str(place)))
