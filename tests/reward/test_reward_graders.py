import json
import threading

import pytest

from vexact.data import load_rows
from vexact.reward.graders import GRADERS, compute_score, grader_for


@pytest.mark.parametrize(("answer", "score"), [("42", 1.0), (" 42\n", 1.0), ("42.", 0.0), ("", 0.0)])
def test_exact_match(answer, score):
    assert compute_score("vexact/addition", answer, 42) == {"score": score, "acc": score}


@pytest.mark.parametrize(
    ("solution", "truth", "score"),
    [
        ("5 + 13 = 18\n#### 18", "18", 1.0),
        ("#### 18", "He sells 9*2.\n#### 18", 1.0),
        ("#### $1,234.00", "1234", 1.0),
        ("#### 3 no, #### 4", "4", 1.0),
        ("#### -7", "-7", 1.0),
        ("#### 7", "-7", 0.0),
        ("the answer is 18", "18", 0.0),
        ("", "18", 0.0),
    ],
)
def test_gsm8k(solution, truth, score):
    assert compute_score("openai/gsm8k", solution, truth)["score"] == score


def test_gsm8k_bad_ground_truth():
    with pytest.raises(ValueError, match="'many' holds no number"):
        compute_score("openai/gsm8k", "#### 1", "many")


@pytest.mark.parametrize(
    ("solution", "truth", "score"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("The answer is $x = 3$", "3", 1.0),
        ("\\boxed{(1, 2]}", "\\boxed{(1,2]}", 1.0),
        ("\\boxed{4}", "3", 0.0),
        ("no idea", "3", 0.0),
    ],
)
def test_mathematics(solution, truth, score):
    assert compute_score("HuggingFaceH4/MATH-500", solution, truth)["acc"] == score


def test_mathematics_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(compute_score("math", "\\boxed{7}", "7")))
    thread.start()
    thread.join()
    assert results == [{"score": 1.0, "acc": 1.0}]


def test_unknown_data_source_lists_the_known_and_the_key():
    message = r"no grader for data_source='mine'; known: exact_match, .* in reward\.custom_reward_function\.path"
    with pytest.raises(ValueError, match=message):
        compute_score("mine", "", "")


def test_every_pattern_names_a_grader():
    for pattern in GRADERS:
        assert callable(grader_for(pattern.replace("*", "x")))


def test_reasoning_gym_uses_the_scorer_of_the_task():
    row = load_rows("reasoning_gym:chain_sum?size=1&min_digits=2")[0]
    truth = row.ground_truth

    def score(text):
        return compute_score(row.data_source, text, truth, row.extra_info)

    assert score(truth) == {"score": 1.0, "acc": 1.0}
    assert score(f"2 and 2, so <answer>{truth}.0</answer> done") == {"score": 1.0, "acc": 1.0}
    partial = score(f"It is {truth}")
    assert 0 < partial["score"] < 1
    assert partial["acc"] == 0.0
    assert score("nothing")["score"] < 0.5


@pytest.mark.parametrize("task", ["countdown", "family_relationships", "rotate_matrix", "number_sequence", "maze"])
def test_reasoning_gym_entries_survive_the_journey(task):
    """Scorers read tuples and integer keys from the entry: the encoded row must give full marks to its own answer."""
    import reasoning_gym

    row = load_rows(f"reasoning_gym:{task}?size=1&seed=5")[0]
    entry = reasoning_gym.create_dataset(task, size=1, seed=5)[0]
    carried = json.loads(json.dumps(row.extra_info))
    assert grader_for(row.data_source).__globals__["_decode"](carried["entry"]) == entry
    assert (
        compute_score(row.data_source, entry["answer"] or row.ground_truth, row.ground_truth, carried)["score"] >= 0.9
    )


def test_reasoning_gym_row_without_entry():
    with pytest.raises(ValueError, match=r"'reasoning_gym/gcd' need extra_info\.entry.*vexact prepare task"):
        compute_score("reasoning_gym/gcd", "1", "1", {})
