"""Rewards under examples/ that recipes name."""

import importlib.util
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_recipes_name_rewards_that_are_there():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs/recipe").glob("*.yaml")}
    named = {
        name: recipe["reward"]["custom_reward_function"]["path"]
        for name, recipe in recipes.items()
        if "reward" in recipe
    }
    assert "smollm2_sums" in named
    assert [path for path in named.values() if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    ("response", "truth", "score", "bare"),
    [
        ("4 - 1 = 3", "3", 1.0, 0.0),
        ("3", "3", 1.0, 1.0),
        ("The answer is 3. It is less than 4", "3", 0.0, 0.0),
        ("5 - 8 = -3.", "-3", 1.0, 0.0),
        ("It is 1,234.", "1234", 1.0, 0.0),
        ("3.0", "3", 1.0, 0.0),
        ("three", "3", 0.0, 0.0),
        ("", "3", 0.0, 0.0),
        ("9" * 400, "3", 0.0, 0.0),
    ],
)
def test_the_last_number_counts(response, truth, score, bare):
    file = ROOT / "examples/rewards/last_number.py"
    spec = importlib.util.spec_from_file_location("last_number", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.compute_score("sums", response, truth) == {"score": score, "acc": score, "bare": bare}
