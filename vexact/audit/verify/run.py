"""The phases of verify, one after another, so that no more than two models are in memory at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch

from vexact import interrupt
from vexact.audit.environment import environment, kernel_constants, tile_table_hash
from vexact.audit.verify.bits import BitTally, Rollout, compare_round
from vexact.audit.verify.cache_rollout import CacheRollout
from vexact.audit.verify.native import NativeComparisons, compare_native
from vexact.audit.verify.report import VerifyReport
from vexact.audit.verify.routes import RouteTap
from vexact.audit.verify.sides import HfSide, TrainingSide, load_hf, load_reference, load_side
from vexact.audit.verify.workload import Round, rounds
from vexact.models import ModelConfig, load_model
from vexact.models.tokenizer import has_tokenizer, read_tokenizer
from vexact.rollout import Engine
from vexact.swaps import make_invariant
from vexact.swaps.router import round_routers
from vexact.types import Sample

log = logging.getLogger(__name__)
ROLLOUT_ATTENTION = "triton-invariant"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """The command's arguments; ``dtype`` and ``device`` resolved. The attention is the training side's.

    Raises ValueError naming the argument, its value and the fix.
    """

    model_path: Path
    model_backend: str = "vexact"
    attn_impl: str = "triton-invariant"
    use_remove_padding: bool = True
    use_fused_lce: bool = True
    dtype: str = "float32"
    num_prompts: int = 64
    max_new_tokens: int = 64
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"--dtype={self.dtype}: use one of {', '.join(_DTYPES)}")
        for name in ("num_prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")


def verify(options: VerifyOptions) -> VerifyReport:
    """
    Raises:
        FileNotFoundError, ValueError: the checkpoint or an option cannot be used.
    """
    started = perf_counter()
    device, dtype, path = torch.device(options.device), _DTYPES[options.dtype], Path(options.model_path)
    config = _engine_config(options)
    side = load_side(options.model_backend, path, dtype, device, options.attn_impl)
    tally, samples, scheduling = _bits(options, side, config)
    log.info("comparing with transformers")
    hf = load_reference(path, dtype, device)
    num_parameters = sum(p.numel() for p in hf.parameters())
    same = compare_native(side, hf, samples, options.use_fused_lce, dtype, device)
    float32 = yardstick = None
    if dtype != torch.float32:
        log.info("comparing with transformers in float32")
        del hf
        reference = load_reference(path, torch.float32, device)
        float32 = compare_native(side, reference, samples, options.use_fused_lce, dtype, device)
        log.info("comparing transformers with its own float32")
        del side
        hf = load_reference(path, dtype, device)
        yardstick = compare_native(HfSide(hf), reference, samples, False, dtype, device)
    return VerifyReport(
        options=options,
        architecture=type(hf).__name__ if config is None else config.architecture,
        rollout="model" if config is None else "engine",
        num_parameters=num_parameters,
        environment=environment(device) | {"tile_table": tile_table_hash(), "kernel_constants": kernel_constants()},
        bits=tally,
        scheduling=scheduling,
        native=NativeComparisons(same, float32, yardstick),
        seconds=perf_counter() - started,
    )


def _engine_config(options: VerifyOptions) -> ModelConfig | None:
    """None for a model that our engine does not run; with ``--model_backend hf`` it can sample from itself.

    Raises ValueError for any other training side.
    """
    try:
        return ModelConfig.from_hf_dir(options.model_path)
    except ValueError as error:
        if options.model_backend != "hf":
            raise
        log.info("our engine does not run this model (%s); the converted model samples from its own key cache", error)
        return None


class Shape(Protocol):
    """What a workload has to fit, of our configuration or of transformers'."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


def _rollout(options: VerifyOptions, config: ModelConfig | None) -> tuple[Callable[..., Rollout], Shape]:
    """A function of an engine's settings, over a model of its own."""
    device, dtype, path = torch.device(options.device), _DTYPES[options.dtype], Path(options.model_path)
    if config is not None:
        return partial(Engine, model=load_model(path, dtype=dtype, device=device, attn_impl=ROLLOUT_ATTENTION)), config
    stock = load_hf(path, dtype, device, "sdpa")
    round_routers(stock)
    converted = make_invariant(stock)
    return partial(CacheRollout, converted, RouteTap(converted)), converted.config


def _bits(
    options: VerifyOptions, side: TrainingSide, config: ModelConfig | None
) -> tuple[BitTally, list[Sample], dict[str, float]]:
    """Part (a) over all rounds: the tally, every sample, and what the schedulers went through."""
    device = torch.device(options.device)
    start, shape = _rollout(options, config)
    tally, samples = BitTally(), []
    scheduling = {"rounds": 0.0, "preemptions": 0.0, "rounds_with_prefix_hits": 0.0}
    for one_round in rounds_of(options, shape):
        interrupt.check()
        started = perf_counter()
        done, stats = compare_round(
            start,
            side,
            one_round,
            device=device,
            fused=options.use_fused_lce,
            padded=not options.use_remove_padding,
            unobserved=device.type == "cuda",
            seed=options.seed,
            tally=tally,
        )
        samples += done
        scheduling["rounds"] += 1
        scheduling["preemptions"] += stats["rollout/preemptions"]
        scheduling["rounds_with_prefix_hits"] += stats["rollout/prefix_hit_ratio"] > 0
        log.info(
            "round %d: %d of %d prompts done, %d tokens differ (pages of %d tokens, %d requests at once, %.1f s)",
            scheduling["rounds"],
            len(samples),
            options.num_prompts,
            len(tally.unmatched),
            one_round.engine["page_size"],
            one_round.engine["max_num_seqs"],
            perf_counter() - started,
        )
    return tally, samples, scheduling


def rounds_of(options: VerifyOptions, shape: Shape) -> Iterator[Round]:
    """What these options run, the same on every call."""
    return rounds(
        num_prompts=options.num_prompts,
        max_new_tokens=options.max_new_tokens,
        max_model_len=shape.max_position_embeddings,
        vocab_size=shape.vocab_size,
        tokenizer=read_tokenizer(options.model_path) if has_tokenizer(options.model_path) else None,
        on_gpu=options.device.startswith("cuda"),
        seed=options.seed,
    )
