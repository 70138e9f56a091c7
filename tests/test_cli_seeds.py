"""Every place that takes a seed takes 0 … 2^63 - 1 and refuses the rest by name, before any model is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vexact import cli
from vexact.config import load_config
from vexact.data.tasks import parse_task
from vexact.rollout import EngineConfig, SamplingParams

LARGEST = 2**63 - 1
COMMANDS = {
    "generate": ["--model_path", "nowhere", "--prompt", "x"],
    "verify": ["--model_path", "nowhere", "--device", "cpu"],
    "serve": ["--model_path", "nowhere", "--port", "0"],
    "prepare": ["tiny"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("seed", [-1, LARGEST + 1, 10**30])
def test_a_command_names_its_option(command: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, *COMMANDS[command], "--seed", str(seed)]) == 2
    assert f"--seed={seed} must be >= 0 and <= 2^63 - 1" in capsys.readouterr().err


PLACES: dict[str, Callable[[int], object]] = {
    "sampling parameter seed=": lambda seed: SamplingParams(seed=seed),
    "seed=": lambda seed: EngineConfig(seed=seed),
    "'reasoning_gym:chain_sum?seed=": lambda seed: parse_task(f"reasoning_gym:chain_sum?seed={seed}"),
}


@pytest.mark.parametrize("name", PLACES)
def test_one_range_everywhere(name: str) -> None:
    check_range(name, PLACES[name])


@pytest.mark.parametrize("key", ["trainer.seed", "data.seed", "actor_rollout_ref.rollout.seed"])
def test_the_range_of_the_configuration(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    needed = [f"actor_rollout_ref.model.path={tmp_path}", "data.train_files=reasoning_gym:chain_sum"]
    check_range(f"{key}=", lambda seed: load_config([*needed, f"{key}={seed}"]))


def check_range(name: str, take: Callable[[int], object]) -> None:
    for seed in (0, LARGEST):
        take(seed)
    for seed in (-1, LARGEST + 1):
        with pytest.raises(ValueError, match="must be") as refused:
            take(seed)
        assert str(refused.value).startswith(f"{name}{seed}")


def test_a_seed_of_numpy_is_an_integer_and_a_truth_value_is_none() -> None:
    assert type(SamplingParams(seed=np.int64(LARGEST)).seed) is int
    with pytest.raises(ValueError, match="seed=True must be an integer, not a truth value"):
        EngineConfig(seed=True)
