"""What a model is: config.json, checked field by field."""

from vexact.models.config.model import ARCHITECTURES, ModelConfig
from vexact.models.config.rope import ROPE_TYPES, RopeConfig

__all__ = ["ARCHITECTURES", "ROPE_TYPES", "ModelConfig", "RopeConfig"]
