"""`vexact doctor`: what will work on this machine, with this model, data and reward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vexact import env, interrupt

if TYPE_CHECKING:
    from vexact.audit.doctor import CheckResult
    from vexact.config import Config
    from vexact.types import Prompt, Score

MODEL_KEY = "actor_rollout_ref.model.path"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say what will work on this machine",
        description="One line per check: ok, warning or error, with what to do. Exits with 1 if there is an error. "
        "With configuration overrides also the model, the first data rows and the reward are tried.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the overrides you would give vexact train")
    parser.add_argument("--model_path", help="directory of a Hugging Face checkpoint to check")
    parser.add_argument("--from_env", action="store_true", help="take model and data as train does")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from vexact.audit.doctor.report import summary

    results = []
    for result in _results(arguments):
        interrupt.check()
        results.append(result)
        sys.stdout.write(f"{result}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{summary(results)}\n")
    return 1 if any(result.status == "error" for result in results) else 0


def _results(arguments: argparse.Namespace) -> Iterator[CheckResult]:
    from vexact.audit.doctor.report import machine_checks, probe_checks
    from vexact.audit.doctor.result import error
    from vexact.config import load_config
    from vexact.device import resolve_device

    config, problem = None, None
    try:
        overrides = _overrides(arguments)
        config = load_config([*env.attention_overrides(), *overrides]) if _is_run(overrides) else None
        device = resolve_device(config.trainer.device if config else "auto")
    except ValueError as raised:
        problem, device = raised, resolve_device("auto")
    run_dir = config.run_dir if config else Path("runs")
    wants_wandb = config is not None and "wandb" in config.trainer.logger
    num_nodes = config.trainer.nnodes if config else 1
    yield from machine_checks(run_dir, Path(env.cache_dir()), device, wants_wandb, num_nodes)
    yield from probe_checks(device)
    if problem is not None:
        yield error("configuration", " ".join(str(problem).split()), "see the message; docs/configuration.md has keys")
    if config is not None:
        yield from _config_checks(config, device)
    elif arguments.model_path:
        yield from _model_checks(arguments.model_path, device)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    from_env = env.path_overrides() if arguments.from_env else []
    from_option = [f"{MODEL_KEY}={arguments.model_path}"] if arguments.model_path else []
    return [*from_env, *from_option, *arguments.overrides]


def _is_run(overrides: list[str]) -> bool:
    """Whether they describe more than a model."""
    return any(not text.startswith(f"{MODEL_KEY}=") for text in overrides)


def _config_checks(config: Config, device: str) -> Iterator[CheckResult]:
    from vexact.audit.doctor.inputs import DATA_ROWS, check_data, check_rewards
    from vexact.audit.doctor.result import warning
    from vexact.trainer.preflight.checks import grade_rows
    from vexact.trainer.workers import first_rows, load_dataset, load_tokenizer, start_rewards

    for notice in config.notices:
        yield warning("configuration", notice, "none needed if that is meant")
    yield from _model_checks(str(config.model.path), device, config)
    files, most = config.data.train_files, first_rows(config, config.data.train_max_samples, DATA_ROWS)
    result, prompts = check_data(lambda: load_dataset(config, load_tokenizer(config), files, most))
    yield result
    if prompts:

        def grade(rows: Sequence[Prompt]) -> tuple[list[Score], list[Score]]:
            with interrupt.unwinding(), start_rewards(config) as rewards:
                return grade_rows(rows, rewards)

        yield check_rewards(grade, prompts)


def _model_checks(path: str, device: str, config: Config | None = None) -> Iterator[CheckResult]:
    import torch

    from vexact.audit.doctor.machine import available_bytes
    from vexact.audit.doctor.model import check_model, check_model_memory, check_tokenizer
    from vexact.audit.doctor.model_probes import model_probe_checks

    result = check_model(path, getattr(torch, config.dtype(device) if config else "float32"))
    yield result
    if result.status != "error":
        if config is None:
            yield check_model_memory(path, device, available_bytes(device))
        else:
            yield from _memory_checks(config)
        yield from model_probe_checks(path, device)
        yield check_tokenizer(path if config is None else config.model.tokenizer_path or path)


def _memory_checks(config: Config) -> Iterator[CheckResult]:
    """The memory plan of the run: what does not fit, or a line per stage and what is tight."""
    from vexact.audit.doctor.result import error, ok, warning
    from vexact.config.memory import ModelShape, memory_notes, memory_problems
    from vexact.config.plan import build_plan
    from vexact.trainer.preflight.machine import layout_of, machine_of

    machine, shape = machine_of(layout_of(config)), ModelShape.read(config.model.path)
    problems = memory_problems(config, shape, machine)
    yield from (error("memory plan", problem.what, problem.fix) for problem in problems)
    if not problems:
        yield from (ok("memory plan", value) for _, value in build_plan(config, machine, shape).memory)
        yield from (warning("memory plan", note, "see the note") for note in memory_notes(config, shape, machine))
