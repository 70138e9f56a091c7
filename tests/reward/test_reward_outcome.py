import math
import socket

import numpy as np
import pytest

from vexact.reward.outcome import failure
from vexact.reward.spec import GradeRequest, RewardError, RewardSpec, call, interpret, load_function


@pytest.mark.parametrize("result", [1, 0.5, True, np.float32(0.5), np.int64(2), np.array(3.0)])
def test_numbers_are_scores(result):
    outcome = interpret(result)
    assert outcome.status == "ok"
    assert outcome.value == float(result)


def test_numeric_keys_are_kept_and_others_dropped():
    outcome = interpret({"score": 1, "acc": True, "pred": "12", "length": np.float64(3), "parts": [1, 2]})
    assert (outcome.status, outcome.value, outcome.extra) == ("ok", 1.0, {"acc": 1.0, "length": 3.0})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (math.nan, "returned nan; it must return a finite number or a dict with 'score'"),
        (-math.inf, "returned -inf"),
        (None, "returned None"),
        ("1.0", "returned '1.0'"),
        ([1.0], r"returned \[1.0\]"),
        (np.zeros(2), r"returned array"),
        ({"acc": 1.0}, "dict without the key 'score'; its keys: acc"),
        ({"score": "1"}, "returned score='1'; it must be a finite number"),
        ({"score": 1.0, "acc": math.nan}, "returned acc=nan; it must be a finite number"),
    ],
)
def test_what_is_not_a_score_is_an_error(result, message):
    outcome = interpret(result)
    assert outcome.status == "error"
    assert outcome.value == 0.0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(outcome.message)


@pytest.mark.parametrize(
    ("errors", "is_hinted"),
    [
        ([PermissionError(13, "Permission denied", "/tmp/x")], True),
        ([OSError(1, "Operation not permitted")], True),
        ([socket.gaierror(-3, "Temporary failure in name resolution"), RuntimeError("Connection error.")], True),
        ([MemoryError()], True),
        ([PermissionError(13, "x" * 10_000)], True),
        ([FileNotFoundError(2, "No such file")], False),
        ([KeyError("x"), ValueError("y")], False),
    ],
)
def test_what_the_sandbox_may_have_caused_says_where_to_allow_it(errors, is_hinted):
    error = errors[0]
    for later in errors[1:]:
        later.__context__, error = error, later
    message = failure(error).message
    assert message.endswith("allow it in reward.sandbox, see docs/rewards.md)") == is_hinted
    assert message.startswith(type(error).__name__)
    assert len(message) <= 500


def test_user_function_gets_verls_arguments(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def judge(data_source, solution_str, ground_truth, extra_info=None, scale=1):\n"
        "    return scale * len(data_source + solution_str + ground_truth + extra_info['x'])\n"
    )
    spec = RewardSpec(str(path), "judge", {"scale": 10})
    function = load_function(spec)
    assert call(function, GradeRequest("a", "bb", "ccc", {"x": "dddd"}), spec.kwargs).value == 100.0


def test_async_user_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "async def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 2\n"
    )
    assert call(load_function(RewardSpec(str(path))), GradeRequest("a", "b", "c"), {}).value == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def other(): pass",
            r"has no function 'compute_score'; functions there: other\. Set reward\.custom_reward_function\.name",
        ),
        ("x = 1", "functions there: none"),
        ("import nonexistent_module", r"importing .*mine\.py failed: ModuleNotFoundError: No module named"),
        ("def f(:", r"importing .*mine\.py failed: SyntaxError"),
        (
            "raise PermissionError(13, 'denied')",
            r"failed: PermissionError: .*denied \(graders are sealed; .*reward\.sandbox",
        ),
    ],
)
def test_bad_user_file(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(RewardError, match=message):
        load_function(RewardSpec(str(path)))


def test_missing_user_file():
    with pytest.raises(RewardError, match=r"reward\.custom_reward_function\.path='no/where\.py' is not a file"):
        load_function(RewardSpec("no/where.py"))
