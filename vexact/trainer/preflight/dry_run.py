"""What `vexact train` refuses, found without training or writing a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from vexact.config import Config, ConfigError
from vexact.config.memory import BYTES, Machine, ModelShape, memory_problems
from vexact.config.memory.parts import GIB, slot_bytes_per_token
from vexact.device import resolve_device
from vexact.distributed import Layout
from vexact.models import ModelConfig, load_model
from vexact.rollout import EngineConfig
from vexact.trainer.preflight import checks
from vexact.trainer.preflight.machine import machine_of
from vexact.trainer.run.directory import check_run_directory
from vexact.trainer.step.profile import check_profile
from vexact.trainer.step.sampling import training_sampling, validation_sampling
from vexact.trainer.workers import (
    actor_config,
    engine_settings,
    first_rows,
    load_dataset,
    load_tokenizer,
    roles_of,
    start_rewards,
)
from vexact.training.parallel.expert_parallel import check_expert_size
from vexact.training.parallel.sequence_parallel import check_size
from vexact.training.passes.experts import check_experts

ROWS = 64  # of each dataset that a dry run makes prompts of
ROLLOUT = "actor_rollout_ref.rollout"


def check_settings(config: Config, layout: Layout) -> None:
    """Builds what a run builds from its settings alone; cheap, so that a run starts with it too.

    Raises:
        ValueError: a part of the trainer refuses its settings, or they do not suit the model or this machine.
    """
    model = ModelConfig.from_hf_dir(Path(os.path.expanduser(config.model.path)))
    training_sampling(config)
    validation_sampling(config)
    check_profile(config, config.trainer.total_training_steps, layout.world_size)
    device, machine = torch.device(layout.device), machine_of(layout)
    trainers = roles_of(config, layout.world_size).trainers
    check_expert_size(config.actor.fsdp_config.expert_parallel_size, len(trainers), model)
    check_size(config.actor.ulysses_sequence_parallel_size, len(trainers), model.num_heads)
    check_experts(actor_config(config, device, total_steps=config.trainer.total_training_steps or 1), model)
    engine = EngineConfig(**engine_settings(config))
    shape = ModelShape.of(model.raw)
    problems = [*_model_problems(config, model), *_memory_problems(config, engine, shape, machine)]
    problems += map(str, memory_problems(config, shape, machine))
    if problems:
        raise ConfigError("\n".join(problems))


def dry_run(config: Config) -> None:
    """Looks at the run directory, reads the tokenizer, the first rows of the data and every weight, and grades some
    rows of each kind in one grader process.

    No weight is kept: the rollout's dtype, which holds the smallest range, must be able to hold each.

    Raises:
        ValueError, FileNotFoundError, RewardError: as a run would.
    """
    check_run_directory(config.run_dir, checks.checkpoint_bytes(config))
    tokenizer, vocab_size = load_tokenizer(config), ModelConfig.from_hf_dir(config.model.path).vocab_size
    data = config.data
    files = {"data.train_files": (data.train_files, data.train_max_samples)}
    if data.val_files:
        files["data.val_files"] = data.val_files, data.val_max_samples
    rows = {
        key: load_dataset(config, tokenizer, names, first_rows(config, most, ROWS))
        for key, (names, most) in files.items()
    }
    for key, dataset in rows.items():
        checks.check_token_ids(key, dataset, vocab_size)
    one_worker = dataclasses.replace(config, reward=dataclasses.replace(config.reward, num_workers=1))
    with closing(start_rewards(one_worker)) as rewards:
        scores = [checks.check_graders(key, dataset, rewards) for key, dataset in rows.items()]
    checks.require_metric(config, scores[0])
    dtype: torch.dtype = getattr(torch, config.dtype(resolve_device(config.trainer.device)))
    load_model(config.model.path, dtype=dtype, device="meta")


def _model_problems(config: Config, model: ModelConfig) -> Iterator[str]:
    if config.max_model_len > model.max_position_embeddings:
        yield (
            f"{ROLLOUT}.max_model_len={config.max_model_len} (data.max_prompt_length + data.max_response_length where "
            f"it is null) exceeds the model's max_position_embeddings={model.max_position_embeddings}; lower it"
        )
    outside = [token for token in config.rollout.stop_token_ids if token >= model.vocab_size]
    if outside:
        yield f"{ROLLOUT}.stop_token_ids={outside[0]} is outside the model's vocabulary of {model.vocab_size}"


def _memory_problems(config: Config, engine: EngineConfig, shape: ModelShape, machine: Machine) -> Iterator[str]:
    """The key-value cache must hold a page, and the machine what is set aside at the start."""
    rollout = config.rollout
    page_bytes = shape.kv_values_per_token * BYTES[config.dtype(machine.device)] * rollout.page_size
    free = machine.device_bytes if machine.device == "cuda" else None
    total = _physical_memory() if free is None else free
    pages = engine.resolve_num_pages(page_bytes=page_bytes, max_model_len=config.max_model_len, free_device_bytes=free)
    if pages * page_bytes > total:
        yield (
            f"a key-value cache of {pages} pages of {page_bytes} bytes takes {pages * page_bytes / GIB:.0f} GiB, and "
            f"there are {total / GIB:.0f}; lower {ROLLOUT}.num_pages, kv_cache_bytes or page_size"
        )
    state = rollout.max_num_seqs * config.max_model_len * slot_bytes_per_token(shape)
    if state > _physical_memory():
        yield (
            f"{ROLLOUT}.max_num_seqs={rollout.max_num_seqs} sequences of {config.max_model_len} tokens take "
            f"{state / GIB:.0f} GiB, and there are {_physical_memory() / GIB:.0f}; lower it"
        )


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
