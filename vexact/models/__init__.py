"""Decoder definitions used by both rollout and training."""

from vexact.models.config import ModelConfig
from vexact.models.decoder import CausalLM, LogitProbe, Targets
from vexact.models.load import load_model, random_model, save_hf
from vexact.models.nonfinite import NonFiniteError
from vexact.models.precision import parameter_dtype

__all__ = [
    "CausalLM",
    "LogitProbe",
    "ModelConfig",
    "NonFiniteError",
    "Targets",
    "load_model",
    "parameter_dtype",
    "random_model",
    "save_hf",
]
