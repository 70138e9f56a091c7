"""The rollout engine: prompts in, samples with exact log-probabilities out."""

from vexact.rollout.engine import Engine
from vexact.rollout.engine_config import EngineConfig
from vexact.rollout.sampling.sampler import NonFiniteLogprobError
from vexact.rollout.sampling.sampling_params import SamplingParams

__all__ = ["Engine", "EngineConfig", "NonFiniteLogprobError", "SamplingParams"]
