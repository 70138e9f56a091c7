"""Validation of sampling parameters: the message names the value and the fix."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING
from vexact.rollout.sampling.sampling_params import SamplingParams


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
        ("n", 2**17, ["n=131072", "at most 65536"]),
        ("max_tokens", None, ["max_tokens=None", "integer"]),
        ("temperature", 1e-5, ["temperature=1e-05", "0.001"]),
        ("temperature", float("inf"), ["temperature=inf", "finite"]),
        ("temperature", 1e38, ["temperature=1e+38", "at most 1e+06"]),
        ("temperature", 10**400, ["temperature=1000", "finite"]),
        ("temperature", "0.7", ["temperature='0.7'", "number"]),
        ("temperature", True, ["temperature=True", "number"]),
        ("top_p", float("nan"), ["top_p=nan", "finite"]),
        ("min_p", None, ["min_p=None", "number"]),
        ("top_k", 1.0, ["top_k=1.0", "integer"]),
        ("seed", True, ["seed=True", "not a truth value"]),
        ("stop", 5, ["stop=5", "a string or a list of strings"]),
        ("stop", b"END", ["stop=b'END'", "a string or a list of strings"]),
        ("stop", {"END": 1}, ["a string or a list of strings"]),
        ("stop", [None], ["stop holds None", "non-empty"]),
        ("stop", "a\ufffd", ["no response can contain", "U+FFFD"]),
        ("stop", ["\ud800"], ["no response can contain"]),
        ("stop_token_ids", 5, ["stop_token_ids=5", "a list of vocabulary indices"]),
        ("stop_token_ids", "12", ["stop_token_ids='12'", "a list of vocabulary indices"]),
        ("stop_token_ids", [True], ["stop_token_ids=True", "not a truth value"]),
        ("stop_token_ids", [1.0], ["stop_token_ids=1.0", "integer"]),
        ("ignore_eos", "false", ["ignore_eos='false'", "True or False"]),
    ],
)
def test_a_bad_value_is_refused_with_its_fix(field, value, words):
    with pytest.raises(ValueError, match="sampling parameter") as error:
        SamplingParams(**{field: value})
    for word in words:
        assert word in str(error.value)


def test_stop_conditions_become_tuples():
    params = SamplingParams(stop="END", stop_token_ids=[4, 5], seed=2**63 - 1)
    assert params.stop == ("END",)
    assert params.stop_token_ids == (4, 5)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()
    assert SamplingParams().stop_token_ids == ()
    assert SamplingParams(stop_token_ids=np.array([3, 4])).stop_token_ids == (3, 4)


def test_the_smallest_top_p_is_a_number_in_fp32():
    """Which everything that samples computes in: 0 would be the share of no token at all."""
    assert np.float32(SamplingParams(top_p=5e-324).top_p) > 0
    assert SamplingParams(top_p=1e-30).top_p == 1e-30


def test_numbers_of_other_libraries_are_numbers():
    params = SamplingParams(n=np.int32(2), temperature=np.float32(0.5), top_p=np.float64(0.9), seed=np.int64(3))
    assert (params.n, params.temperature, params.top_p, params.seed) == (2, 0.5, 0.9, 3)
    assert SamplingParams(temperature=1).temperature == 1.0
    assert type(SamplingParams(prompt_logprobs=np.int64(0)).prompt_logprobs) is int


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("min_tokens", 3, "forbids stop tokens at first"),
        ("logit_bias", {5: 1.0}, "could not repeat"),
        ("repetition_penalty", 1.1, "could not repeat"),
        ("presence_penalty", -0.5, "could not repeat"),
        ("frequency_penalty", np.float32(0.5), "could not repeat"),
        ("allowed_token_ids", np.array([1, 2]), "could not repeat"),
        ("allowed_token_ids", [], "could not repeat"),  # it allows nothing
        ("bad_words", ("a",), "could not repeat"),
        ("min_tokens", np.array(2), "forbids stop tokens at first"),
        ("frequency_penalty", torch.tensor(0.5), "could not repeat"),
        ("min_tokens", True, "forbids stop tokens at first"),
        ("presence_penalty", math.nan, "could not repeat"),
    ],
)
def test_what_the_trainer_could_not_repeat_is_refused_by_name(name, value, reason):
    with pytest.raises(ValueError, match=f"sampling parameter {name}=.* is not supported: .*{reason}.*; leave it out"):
        SamplingParams(**{name: value})


def test_the_same_at_values_that_do_nothing_is_accepted():
    neutral = {
        **{"min_tokens": 0, "logit_bias": {}, "repetition_penalty": 1.0, "presence_penalty": 0, "bad_words": ()},
        **{"frequency_penalty": 0.0, "allowed_token_ids": None},
    }
    assert set(neutral) == set(REFUSED_SAMPLING)
    params = SamplingParams(n=2, **neutral)
    assert params == SamplingParams(n=2)
    assert SamplingParams(logit_bias={5: 0.0, 7: 0}) == SamplingParams()
    assert SamplingParams(min_tokens=np.array(0), repetition_penalty=torch.tensor(1.0)) == SamplingParams()
    assert dataclasses.replace(params, n=1) == pickle.loads(pickle.dumps(SamplingParams()))
    with pytest.raises(ValueError, match="min_tokens=1"):
        dataclasses.replace(params, min_tokens=1)
