"""What a model is: config.json, checked field by field."""

from vexact.models.config.mla import MlaConfig
from vexact.models.config.model import ARCHITECTURES, ModelConfig
from vexact.models.config.moe import MoeConfig
from vexact.models.config.rope import ROPE_TYPES, RopeConfig

__all__ = ["ARCHITECTURES", "ROPE_TYPES", "MlaConfig", "ModelConfig", "MoeConfig", "RopeConfig"]
