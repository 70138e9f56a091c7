"""What is said of the rows of a run before its model is read."""

import pytest

from vexact.config import load_config
from vexact.config.load import recipes
from vexact.data.tasks import is_task, parse_task
from vexact.trainer.workers import load_inputs

TASK = "reasoning_gym:chain_sum?max_digits=1&min_terms=2&max_terms=2"


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        ("&size=40&seed=1", "&size=8&seed=2", "8 of the 8 prompts of data.val_files"),
        ("&size=1&seed=1", "&size=1&seed=1000001", ""),
    ],
)
def test_validation_on_training_prompts_is_said(overrides, caplog, train, val, said):
    files = f"data.train_files={TASK}{train}", f"data.val_files={TASK}{val}", "data.max_prompt_length=512"
    load_inputs(load_config(overrides(*files, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024")))
    found = [text for text in caplog.messages if "was trained on" in text]
    assert len(found) == bool(said)
    if said:
        assert said in found[0]
        assert found[0].endswith("seeds that are further apart than size")


@pytest.mark.parametrize("recipe", recipes())
def test_no_recipe_validates_on_the_rows_that_it_trains_on(recipe):
    data = load_config([f"recipe={recipe}"], checked=False).data
    train, val = ([parse_task(name) for name in names if is_task(name)] for names in (data.train_files, data.val_files))
    for one in train:
        for other in val:
            ends = one.seed + one.size <= other.seed or other.seed + other.size <= one.seed
            assert ends or one.name != other.name, "row i is made of seed + i"
