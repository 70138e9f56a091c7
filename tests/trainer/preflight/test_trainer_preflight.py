"""Mistakes in validation rows and settings stop a run before its first step, as those in training rows do."""

import json

import pytest

from vexact.config import load_config
from vexact.reward.spec import RewardError
from vexact.trainer.driver import Driver
from vexact.trainer.launch import run

VAL_KWARGS = "actor_rollout_ref.rollout.val_kwargs"


@pytest.fixture
def start(overrides, tmp_path, monkeypatch):
    """Starts a run that must not reach a step, with rows as its validation file."""

    def never(self):
        raise AssertionError("the run began")

    monkeypatch.setattr(Driver, "run", never)

    def begin(*more, rows=({"prompt": "1+2=", "data_source": "sum", "reward_model": {"ground_truth": "3"}},)):
        (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = (f"data.val_files={tmp_path / 'val.jsonl'}", "trainer.val_before_train=false")
        run(load_config(overrides(*files, *more)))

    return begin


def _row(prompt="1+2=", source="sum"):
    return {"prompt": prompt, "data_source": source, "reward_model": {"ground_truth": "3"}}


def test_good_rows_reach_the_first_step(start):
    with pytest.raises(AssertionError, match="the run began"):
        start()


@pytest.mark.parametrize("others", [0, 20])
def test_a_data_source_without_a_grader(start, tmp_path, others):
    """Wherever its first row is: the built-in graders know exact_match and not my_quiz."""
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(_row(source='exact_match'))}\n" * 4)
    built_in = (f"data.train_files={tmp_path / 'train.jsonl'}", "reward.custom_reward_function.path=null")
    rows = [*[_row(source="exact_match")] * others, _row(source="my_quiz")]
    with pytest.raises(RewardError, match=r"data\.val_files, rows of data_source 'my_quiz': .*no grader"):
        start(*built_in, rows=rows)


def test_a_grader_that_fails_for_one_source_only(start, tmp_path):
    (tmp_path / "picky.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'sum': 1.0, 'difference': 0.5}[data_source]\n"
    )
    picky = f"reward.custom_reward_function.path={tmp_path / 'picky.py'}"
    with pytest.raises(RewardError, match=r"data\.val_files, rows of data_source 'product': .*KeyError"):
        start(picky, rows=[_row(), _row(source="difference"), _row(source="product")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["do_sample=true", "temperature=0.0005"], rf"{VAL_KWARGS}\.temperature=0\.0005: must be 0"),
        (["do_sample=true", "temperature=0.0009", "n=2"], rf"{VAL_KWARGS}\.temperature=0\.0009: must be 0"),
    ],
)
def test_sampling_that_the_engine_refuses(start, more, message):
    with pytest.raises(ValueError, match=message):
        start(*(f"{VAL_KWARGS}.{setting}" for setting in more))


def test_a_prompt_that_is_too_long(start):
    with pytest.raises(ValueError, match=r"data\.val_files: .*val\.jsonl, row 1: the prompt has 18 tokens, more than"):
        start(rows=[_row(), _row(prompt="1+2+3+4+5+6+7+8+9=")])


def test_a_prompt_that_the_cache_cannot_hold(start):
    tight = ("actor_rollout_ref.rollout.kv_cache_bytes=5000", "actor_rollout_ref.rollout.page_size=4")
    with pytest.raises(ValueError, match=r"key-value cache|KV cache|kv_cache_bytes"):
        start(*tight)


def test_an_id_outside_the_vocabulary(start, tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    size = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "wide")
    message = rf"data\.val_files, row 1 \('1\+2=<tool>'\): token id {size} is outside the model's vocabulary of {size}"
    with pytest.raises(ValueError, match=message):
        start(f"actor_rollout_ref.model.tokenizer_path={tmp_path / 'wide'}", rows=[_row(), _row(prompt="1+2=<tool>")])


def test_dynamic_sampling_by_a_key_that_the_reward_lacks(start):
    with pytest.raises(ValueError, match=r"filter_groups\.metric=accuracy: the reward returned no such key"):
        start("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=accuracy")
