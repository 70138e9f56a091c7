"""Validation of sampling parameters: the message names the value and the fix."""

import pytest

from vexact.rollout.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n", 0, ["n=0", "at least 1"]),
        ("n", True, ["n=True", "integer"]),
        ("max_tokens", 0, ["max_tokens=0", "at least 1"]),
        ("max_tokens", 2.5, ["max_tokens=2.5", "integer"]),
        ("temperature", -1.0, ["temperature=-1.0", "0 (greedy)"]),
        ("temperature", 1e-9, ["temperature=1e-09", "0.001"]),
        ("temperature", float("nan"), ["temperature=nan", "finite"]),
        ("temperature", "warm", ["temperature='warm'", "number"]),
        ("top_p", 0.0, ["top_p=0.0", "(0, 1]", "use 1.0"]),
        ("top_p", 1.5, ["top_p=1.5", "(0, 1]"]),
        ("min_p", 1.1, ["min_p=1.1", "[0, 1]"]),
        ("top_k", -2, ["top_k=-2", "-1 or 0"]),
        ("seed", "x", ["seed='x'", "integer"]),
        ("stop", ["ok", ""], ["stop holds ''", "non-empty"]),
        ("stop_token_ids", [3, -1], ["stop_token_ids=-1", "at least 0"]),
    ],
)
def test_a_bad_value_is_refused_with_its_fix(field, value, words):
    with pytest.raises(ValueError, match="sampling parameter") as error:
        SamplingParams(**{field: value})
    for word in words:
        assert word in str(error.value)


def test_stop_conditions_become_tuples():
    params = SamplingParams(stop="END", stop_token_ids=[4, 5], seed=2**70)
    assert params.stop == ("END",)
    assert params.stop_token_ids == (4, 5)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()
    assert SamplingParams().stop_token_ids == ()
