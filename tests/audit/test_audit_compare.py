from dataclasses import replace

import numpy as np
import pytest

from vexact.audit import Audit, ExactnessError, compare
from vexact.audit.mismatch_metrics import mismatch_metrics
from vexact.types import Sample


def _sample(name, logprobs):
    logprobs = np.array(logprobs, dtype=np.float32)
    tokens = tuple(range(10, 10 + len(logprobs)))
    return Sample(name, (1,), tokens, logprobs, np.full(len(logprobs), -np.inf, np.float32), 1.0, "length", 0)


def test_equal_bits_compare_equal():
    samples = [_sample("a", [-0.5, -1.0]), _sample("b", [-2.0])]
    result = compare(samples, [s.logprobs.copy() for s in samples])
    assert (result.tokens_compared, result.tokens_different, result.first) == (3, 0, None)
    assert result.metrics()["bitwise/first_different_position"] == -1


def test_one_ulp_that_probabilities_hide_is_found():
    logprob = np.float32(-1e-9)
    samples = [_sample("a", [-0.5]), _sample("b", [-1.0, logprob])]
    trainer = [s.logprobs.copy() for s in samples]
    trainer[1][1] = np.nextafter(logprob, np.float32(0))
    assert np.exp(trainer[1][1]) == np.exp(logprob)
    result = compare(samples, trainer)
    assert (result.tokens_different, result.sequences_different, result.max_ulp) == (1, 1, 1)
    assert (result.first.request_id, result.first.position, result.first.token_id) == ("b", 1, 11)


def test_ulps_count_across_zero_and_nan_is_different():
    tiny = np.float32(1e-45)
    assert compare([_sample("a", [tiny])], [np.array([-tiny], np.float32)]).max_ulp == 2
    assert compare([_sample("a", [-1.0])], [np.array([np.nan], np.float32)]).tokens_different == 1


def test_every_place_that_differs_is_named_by_request():
    samples = [_sample("a", [-0.5, -1.0]), _sample("b", [-2.0, -3.0, -4.0]), _sample("c", [-np.inf])]
    trainer = [s.logprobs.copy() for s in samples]
    trainer[1][[0, 2]] = -2.5
    audit = Audit("warn")
    audit.begin(samples)
    assert audit.different_tokens() is None, "nothing was compared"
    audit.check([0], [trainer[0]])
    assert audit.different_tokens() == {"a": []}, "what was not compared is not there"
    audit.check([0, 1, 2], trainer)
    assert audit.different_tokens() == {"a": [], "b": [0, 2], "c": [0]}, "an infinity is no log-probability"
    assert audit.metrics()["bitwise/tokens_different"] == 3
    routed = [replace(sample, route_digests=np.arange(len(sample.token_ids))) for sample in samples[:2]]
    audit.begin(routed)
    audit.check([0, 1], [s.logprobs for s in routed], [np.array([0, 7]), np.arange(3)])
    assert audit.different_tokens() == {"a": [1], "b": []}, "experts count, too"
    audit.begin(samples)
    assert audit.different_tokens() is None


def test_strict_raises_naming_token_and_values_and_warn_logs(caplog):
    samples = [_sample("step3-row7/0", [-0.5, -1.0])]
    wrong = [np.array([-0.5, -1.25], np.float32)]
    strict = Audit("strict")
    strict.begin(samples)
    with pytest.raises(
        ExactnessError, match=r"request step3-row7/0, response position 1, token 11, rollout -1\.0, trainer -1\.25"
    ):
        strict.check([0], wrong)
    assert strict.metrics()["bitwise/tokens_different"] == 1
    warn = Audit("warn")
    warn.begin(samples)
    warn.check([0], wrong)
    warn.check([0], wrong)
    assert caplog.text.count("1 of 2 log-probabilities") == 1
    assert warn.total_different == 2
    off = Audit("off")
    off.begin(samples)
    off.check([0], wrong)
    assert off.metrics() == {}


def test_the_audit_times_itself(monkeypatch):
    clock = iter([10.0, 10.25])
    monkeypatch.setattr("vexact.audit.audit.perf_counter", lambda: next(clock))
    audit = Audit("warn")
    samples = [_sample("a", [-0.5])]
    audit.begin(samples)
    audit.check([0], [samples[0].logprobs])
    assert audit.metrics()["timing_s/audit"] == 0.25


def test_sequences_are_matched_by_index():
    samples = [_sample("a", [-0.5]), _sample("b", [-1.0]), _sample("c", [-2.0])]
    audit = Audit("strict")
    audit.begin(samples)
    audit.check([2, 0], [samples[2].logprobs, samples[0].logprobs])
    assert audit.metrics()["bitwise/tokens_compared"] == 2
    with pytest.raises(ExactnessError):
        audit.check([0, 2], [samples[2].logprobs, samples[0].logprobs])


def test_verl_metrics_by_hand_and_zero_when_equal():
    rollout, trainer = [np.log([0.5, 0.25]).astype(np.float32)], [np.log([0.25, 0.25]).astype(np.float32)]
    metrics = mismatch_metrics(rollout, trainer)
    assert metrics["training/rollout_probs_diff_max"] == pytest.approx(0.25)
    assert metrics["training/rollout_probs_diff_mean"] == pytest.approx(0.125)
    assert metrics["rollout_corr/kl"] == pytest.approx(np.log(2) / 2)
    assert metrics["rollout_corr/k3_kl"] == pytest.approx((0.5 + np.log(2) - 1) / 2)
    assert metrics["rollout_corr/log_ppl_diff"] == pytest.approx(np.log(2) / 2)
    equal = mismatch_metrics(rollout, rollout)
    zero = ("kl", "k3_kl", "chi2_token", "chi2_seq", "log_ppl_diff", "log_ppl_abs_diff")
    assert all(equal[f"rollout_corr/{name}"] == 0 for name in zero)
    assert equal["training/rollout_probs_diff_max"] == equal["training/rollout_probs_diff_std"] == 0
    assert equal["training/rollout_actor_probs_pearson_corr"] == pytest.approx(1.0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="use strict, warn or off"):
        Audit("loose")
    with pytest.raises(ValueError, match="request a: rollout log-probs"):
        compare([_sample("a", [-1.0])], [np.array([-1.0])])
