"""How a configuration samples, in training and in validation."""

from __future__ import annotations

from vexact.config import Config
from vexact.rollout import SamplingParams


def training_sampling(config: Config) -> SamplingParams:
    """Of every rollout. Raises ValueError for what the sampler refuses."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.n,
        max_tokens=config.data.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop=list(rollout.stop) or None,
        stop_token_ids=list(rollout.stop_token_ids) or None,
        ignore_eos=rollout.ignore_eos,
    )


def validation_sampling(config: Config) -> SamplingParams:
    """Of every validation; greedy, with no filter, unless ``val_kwargs.do_sample``. Raises as the other does."""
    settings = config.rollout.val_kwargs
    return SamplingParams(
        n=settings.n,
        max_tokens=config.data.max_response_length,
        temperature=settings.temperature if settings.do_sample else 0.0,
        top_p=settings.top_p if settings.do_sample else 1.0,
        top_k=settings.top_k if settings.do_sample else -1,
        min_p=settings.min_p if settings.do_sample else 0.0,
        stop=list(config.rollout.stop) or None,
        stop_token_ids=list(config.rollout.stop_token_ids) or None,
        ignore_eos=config.rollout.ignore_eos,
    )
