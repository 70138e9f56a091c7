"""Decoder definitions used by both rollout and training."""

from vexact.models.config import ModelConfig
from vexact.models.decoder import CausalLM, LogitProbe, Targets
from vexact.models.load import load_model, random_model, save_hf
from vexact.models.nonfinite import NonFiniteError

__all__ = [
    "CausalLM",
    "LogitProbe",
    "ModelConfig",
    "NonFiniteError",
    "Targets",
    "load_model",
    "random_model",
    "save_hf",
]
