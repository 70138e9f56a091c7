"""The configuration: a Hydra tree composed into typed, checked, frozen dataclasses."""

from vexact.config.fields import ConfigError
from vexact.config.load import configs_dir, load_config, recipes
from vexact.config.schema import Config

__all__ = ["Config", "ConfigError", "configs_dir", "load_config", "recipes"]
