"""NaN and infinity are no log-probabilities: different, counted and named in audit, self-test and verify."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from audit_support import CONFIG, PAIR

from vexact import cli
from vexact.audit import Audit, ExactnessError, compare
from vexact.audit.certificate import CertificateError, require_certificate
from vexact.audit.mismatch_metrics import mismatch_metrics
from vexact.audit.verify.bits import BitTally
from vexact.models import random_model, save_hf
from vexact.models.nonfinite import all_finite, cause_of_nonfinite, find_nonfinite
from vexact.rollout import Engine, NonFiniteLogprobError
from vexact.training import Actor, ActorConfig
from vexact.types import Sample

NAN, INF = np.nan, np.inf
pytestmark = pytest.mark.usefixtures("one_thread")


def _sample(name, logprobs):
    logprobs = np.array(logprobs, dtype=np.float32)
    tokens = tuple(range(10, 10 + len(logprobs)))
    return Sample(name, (1,), tokens, logprobs, np.full(len(logprobs), -np.inf, np.float32), 1.0, "length", 0)


@pytest.mark.parametrize(
    ("rollout", "trainer"),
    [(NAN, NAN), (-INF, -INF), (INF, INF), (-1.0, NAN), (NAN, -1.0), (-INF, -1.0), (-1.0, INF), (NAN, -INF)],
)
def test_a_value_that_is_not_finite_is_different_on_either_side(rollout, trainer):
    samples = [_sample("a", [-0.5, -0.25]), _sample("b", [-1.0, rollout, -2.0])]
    other = [samples[0].logprobs.copy(), np.array([-1.0, trainer, -2.0], np.float32)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compare(samples, other)
    assert (result.tokens_compared, result.tokens_different, result.tokens_nonfinite) == (5, 1, 1)
    assert (result.sequences_different, result.max_abs_logprob_diff) == (1, INF)
    assert not result.exact
    assert result.metrics()["bitwise/tokens_nonfinite"] == 1
    assert (result.first.request_id, result.first.position, result.first.token_id) == ("b", 1, 11)
    assert "request b, response position 1, token 11, rollout " in result.describe()
    assert "(not finite)" in result.describe()


def test_nan_of_any_payload_and_sign_counts():
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32)
    samples = [_sample("a", bits.view(np.float32))]
    other = [samples[0].logprobs.copy()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(samples, other).tokens_nonfinite == 4
        assert mismatch_metrics([samples[0].logprobs], other)["training/rollout_probs_diff_valid"] == 0


def test_finite_differences_and_zeros_keep_their_meaning():
    result = compare([_sample("a", [0.0, -1.0, -2.0])], [np.array([-0.0, -1.0, NAN], np.float32)])
    assert (result.tokens_different, result.tokens_nonfinite) == (2, 1)
    assert (result.first.position, result.first.is_finite) == (0, True)
    finite = compare([_sample("a", [-1.0, -2.0])], [np.array([-1.0, -2.5], np.float32)])
    assert (finite.tokens_nonfinite, finite.max_abs_logprob_diff) == (0, 0.5)


def test_strict_stops_at_equal_nan_and_warn_says_it_once(caplog):
    samples = [_sample("a", [-0.5, NAN])]
    strict, warn = Audit("strict"), Audit("warn")
    for audit in (strict, warn):
        audit.begin(samples)
    with pytest.raises(ExactnessError, match=r"1 of 2 .*no finite value \(1\).*token 11, rollout nan, trainer nan"):
        strict.check([0], [samples[0].logprobs.copy()])
    for _ in range(2):
        warn.check([0], [samples[0].logprobs.copy()])
    assert caplog.text.count("no finite value") == 1
    assert warn.metrics()["bitwise/tokens_nonfinite"] == 1
    assert warn.metrics()["training/rollout_probs_diff_valid"] == 0


def test_an_audit_of_nothing_proves_nothing():
    strict, warn = Audit("strict"), Audit("warn")
    strict.begin([])
    with pytest.raises(ExactnessError, match="nothing was compared"):
        strict.require_compared(1)
    with pytest.raises(ExactnessError, match="nothing was compared"):
        strict.check([], [])
    warn.begin([])
    warn.check([], [])
    warn.require_compared(1)
    strict.begin([_sample("a", [-0.5])])
    strict.check([0], [np.array([-0.5], np.float32)])
    strict.require_compared(1)
    assert not BitTally(tokens=3).exact


def test_a_rank_that_compared_nothing_is_missed():
    samples = [_sample(name, [-0.5]) for name in "abc"]
    audit = Audit("strict")
    audit.begin(samples)
    audit.check([0, 2, 2], [np.array([-0.5], np.float32)] * 3)
    audit.require_compared(2)
    with pytest.raises(
        ExactnessError, match=r"2 of 3 samples were compared, 3 log-probabilities: .* proves nothing"
    ) as caught:
        audit.require_compared(3)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_mismatch_metrics_are_no_zeros_where_nothing_can_be_compared(value):
    side = [np.array([-0.5, value], np.float32)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = mismatch_metrics(side, side)
    assert metrics.pop("training/rollout_probs_diff_valid") == 0
    assert all(np.isnan(figure) for figure in metrics.values())


def _poisoned_head(model):
    """Only the training side scores through the head's fused form."""
    with torch.no_grad():
        model.lm_head_weight[7] = NAN
    return model


@pytest.mark.parametrize("exactness", ["strict", "warn"])
def test_the_self_test_names_a_trainer_that_computes_no_number(tmp_path, caplog, exactness):
    engine, actor = Engine(model=random_model(CONFIG, seed=1)), Actor(random_model(CONFIG, seed=1), ActorConfig())
    _poisoned_head(actor.model)
    if exactness == "strict":
        with pytest.raises(CertificateError, match=r"no finite value \(40\).*trainer nan \(not finite\)"):
            require_certificate(engine, actor, tmp_path, exactness, **PAIR)
    else:
        require_certificate(engine, actor, tmp_path, exactness, **PAIR)
        assert "no finite value (40)" in caplog.text
    written = json.loads((tmp_path / "certificate.json").read_text(), parse_constant=pytest.fail)
    assert written["exact"] is False
    assert written["comparison"]["tokens_nonfinite"] == 40
    assert written["comparison"]["first"]["trainer"] == "nan"


@pytest.mark.parametrize("exactness", ["strict", "warn"])
def test_the_self_test_refuses_an_engine_that_samples_no_number(tmp_path, exactness):
    engine, actor = Engine(model=random_model(CONFIG, seed=1)), Actor(random_model(CONFIG, seed=1), ActorConfig())
    require_certificate(engine, actor, tmp_path, exactness, **PAIR)
    for model in (engine.model, actor.model):
        _poisoned_head(model)
    with pytest.raises(NonFiniteLogprobError, match=r"request certificate/0, .*lm_head.weight holds 32 non-finite"):
        require_certificate(engine, actor, tmp_path, exactness, **PAIR)
    assert not (tmp_path / "certificate.json").exists(), "the one of the earlier start says nothing about this one"


def test_the_tally_of_verify_counts_both_sides():
    tally = BitTally(tokens=4)
    tally.add_logprobs([_sample("a", [NAN, -1.0, -2.0, -3.0])], [np.array([NAN, -1.0, INF, -3.0], np.float32)])
    assert (tally.logprobs_different, tally.non_finite, len(tally.unmatched), tally.exact) == (2, 2, 2, False)


def test_verify_says_which_number(tmp_path, capsys):
    """An overflow, so that no loader can refuse the weights."""
    model = random_model(CONFIG, seed=1)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    save_hf(model.named_parameters(), CONFIG, tmp_path / "model")
    arguments = ["--num_prompts", "2", "--max_new_tokens", "2", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    assert cli.main(["verify", "--model_path", str(tmp_path / "model"), *arguments]) == 1
    table = capsys.readouterr().out
    assert "NOT EXACT: request " in table
    assert "Every weight is finite, so a number overflows inside the float32 forward pass" in table
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["passed"] is False
    assert "log-probability nan" in report["error"]


def test_the_scan_names_the_first_bad_tensor():
    weights = {"a": torch.ones(3), "b": torch.tensor([[1.0, INF], [NAN, 2.0]]), "c": torch.tensor([NAN])}
    assert not all_finite(weights.values())
    assert all_finite([torch.ones(2), torch.empty(0), torch.tensor([65504.0], dtype=torch.float16)])
    assert find_nonfinite(weights.items()) == "b holds 2 non-finite numbers of 4, the first inf at [0, 1]"
    assert find_nonfinite([("d", torch.tensor([-INF], dtype=torch.bfloat16))]).endswith("the first -inf at [0]")
    assert "try a wider dtype" in cause_of_nonfinite([("a", torch.ones(1))], torch.bfloat16)
