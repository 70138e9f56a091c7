"""Experts of the rollout against those of the trainer: what is counted, said and refused."""

import dataclasses
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from audit_support import PAIR
from moe_configs import MOONLIGHT, QWEN3_MOE

from vexact.audit import Audit, ExactnessError, compare
from vexact.audit.certificate import CertificateError, require_certificate, run_self_test
from vexact.models import ModelConfig, random_model
from vexact.models.layers import MoE
from vexact.models.opset import set_ops
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.mismatch import apply_mismatch
from vexact.training import Actor, ActorConfig
from vexact.types import Sample, TrainSequence

pytestmark = pytest.mark.usefixtures("one_thread")


def _sample(name, digests):
    count = 3 if digests is None else len(digests)
    values = np.full(count, -1.0, np.float32)
    routes = None if digests is None else np.array(digests, np.int64)
    return Sample(name, (1, 2), (5, 6, 7)[:count], values, values, 1.0, "length", 0, route_digests=routes)


def _equal(samples):
    return [sample.logprobs.copy() for sample in samples]


def _routes(*digests):
    return [np.array(values, np.int64) for values in digests]


def test_equal_routes_are_exact_and_counted():
    samples = [_sample("a", [1, -2]), _sample("b", [2**62, 4, 5])]
    result = compare(samples, _equal(samples), _routes([1, -2], [2**62, 4, 5]))
    assert result.exact
    assert result.metrics()["bitwise/routes_compared"] == 5
    assert result.metrics()["bitwise/routes_different"] == 0


def test_another_expert_is_named_although_the_bits_agree():
    samples = [_sample("a", [1, 2]), _sample("b", [3, 4, 5])]
    result = compare(samples, _equal(samples), _routes([1, 2], [3, 9, 8]))
    assert (result.exact, result.differs, result.tokens_different) == (False, True, 0)
    assert result.metrics()["bitwise/routes_different"] == 2
    assert result.describe() == (
        "of 5 tokens 2 were predicted by rows that went to other experts. First: request b, response position 1, "
        "token 6"
    )


def test_bits_and_experts_that_differ_are_both_said():
    samples = [_sample("a", [1, 2])]
    result = compare(samples, [np.array([-1.0, -2.0], np.float32)], _routes([1, 3]))
    assert "1 of 2 log-probabilities in 1 sequences have other bits" in result.describe()
    assert result.describe().endswith(
        "(8388608 ulp). And of 2 tokens 1 were predicted by rows that went to other experts. First: request a, "
        "response position 1, token 6"
    )


def test_a_model_without_experts_has_no_such_metric():
    samples = [_sample("a", None)]
    result = compare(samples, _equal(samples))
    assert result.exact
    assert not [name for name in result.metrics() if "routes" in name]


@pytest.mark.parametrize(("ours", "theirs"), [(None, [[1, 2, 3]]), ([1, 2, 3], None)])
def test_routes_of_one_side_alone_are_not_exact(ours, theirs):
    samples = [_sample("a", ours)]
    audit = Audit("strict")
    audit.begin(samples)
    with pytest.raises(ExactnessError, match=r"the experts of 3 tokens were not compared.*proves nothing") as caught:
        audit.check([0], _equal(samples), None if theirs is None else _routes(*theirs))
    assert not caught.value.comparison.differs
    assert audit.metrics()["bitwise/routes_compared"] == 0


def test_one_sample_without_routes_is_not_exact_either():
    samples = [_sample("a", [1, 2]), _sample("b", None)]
    result = compare(samples, _equal(samples), _routes([1, 2], [1, 2, 3]))
    assert (result.exact, result.routes.compared, result.routes.missing) == (False, 2, 3)


@pytest.mark.parametrize("wrong", [np.zeros(2, np.int64), np.zeros(3, np.int32), np.zeros(3, np.float64)])
def test_digests_of_another_length_or_type_are_refused(wrong):
    samples = [_sample("a", [1, 2, 3])]
    with pytest.raises(ValueError, match=r"request a: the rollout's route digests are int64.*both must be int64, one"):
        compare(samples, _equal(samples), [wrong])


def test_strict_stops_warn_says_it_once_and_off_is_silent(caplog):
    samples = [_sample("a", [1, 2])]
    audits = {name: Audit(name) for name in ("strict", "warn", "off")}
    for audit in audits.values():
        audit.begin(samples)
    with pytest.raises(ExactnessError, match=r"rollout and trainer disagree: of 2 tokens 1 were.*request a") as caught:
        audits["strict"].check([0], _equal(samples), _routes([1, 7]))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            audits["warn"].check([0], _equal(samples), _routes([1, 7]))
    assert len([record for record in caplog.records if "other experts" in record.message]) == 1
    assert audits["warn"].totals() == "4 log-probabilities compared, 0 different; 4 routes compared, 2 different"
    audits["off"].check([0], _equal(samples), _routes([1, 7]))
    assert audits["off"].metrics() == {}


def test_warn_says_once_that_routes_are_missing(caplog):
    samples, audit = [_sample("a", None)], Audit("warn")
    audit.begin(samples)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            audit.check([0], _equal(samples), _routes([1, 2, 3]))
    assert len([record for record in caplog.records if "not compared: one side" in record.message]) == 1


def _model(raw, dtype=torch.float32, seed=0):
    return random_model(ModelConfig.from_hf_dict(raw), seed, dtype)


def _trained(model, samples, **config):
    """The audit after the trainer's forward of these samples."""
    audit = Audit("warn")
    audit.begin(samples)
    actor = Actor(model, ActorConfig(**config))
    actor.update([TrainSequence(s, np.ones(len(s.token_ids), np.float32)) for s in samples], audit.check)
    return audit.metrics()


PROMPTS = [[(7 * i + j) % 60 for j in range(4 + i)] for i in range(8)]
PARAMS = SamplingParams(n=2, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("raw", [QWEN3_MOE, MOONLIGHT], ids=["qwen3-moe", "moonlight"])
def test_another_order_of_additions_flips_experts(raw):
    model = _model(raw, torch.bfloat16)
    apply_mismatch(model, "k_order", 1.0)
    found = _trained(
        _model(raw, torch.bfloat16), Engine(model=model, max_model_len=64).generate(PROMPTS, PARAMS), dtype="bfloat16"
    )
    assert 0 < found["bitwise/routes_different"] < found["bitwise/routes_compared"]
    assert found["bitwise/tokens_different"] > 0


def test_noise_on_the_logits_is_no_matter_of_experts():
    model = _model(QWEN3_MOE)
    apply_mismatch(model, "noise", 0.1)
    found = _trained(_model(QWEN3_MOE), Engine(model=model, max_model_len=64).generate(PROMPTS, PARAMS))
    assert found["bitwise/tokens_different"] > 0 == found["bitwise/routes_different"]
    assert found["bitwise/routes_compared"] == 16 * 24


def test_an_expert_that_no_log_probability_shows_is_found(tmp_path):
    """All experts of a layer are alike, and one router is shifted by one: only the digest can tell."""
    models = [_model(QWEN3_MOE) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            experts = model.layers[1].mlp.experts
            for weight in experts.parameters():
                weight.copy_(weight[:1].expand_as(weight))
        router = models[0].layers[1].mlp.router.weight
        router.copy_(router.roll(1, 0))
    engine, actor = Engine(model=models[0], max_model_len=64), Actor(models[1], ActorConfig())
    result = run_self_test(engine, actor).comparison
    assert result.routes.different > 0
    if not result.tokens_different:
        assert "other experts" in result.describe()
    with pytest.raises(CertificateError, match="other experts"):
        require_certificate(engine, actor, tmp_path, "strict", **PAIR)
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written["comparison"]["routes"]["different"] == result.routes.different


def test_the_certificate_says_how_many_routes_were_equal(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        require_certificate(
            Engine(model=_model(MOONLIGHT), max_model_len=64), Actor(_model(MOONLIGHT), ActorConfig()), tmp_path,
            "strict", **PAIR,
        )  # fmt: skip
    written = json.loads((tmp_path / "certificate.json").read_text())
    routes, compared = written["comparison"]["routes"], written["comparison"]["tokens_compared"]
    assert (routes["compared"], routes["different"], routes["missing"]) == (compared, 0, 0)
    assert f"{compared} log-probabilities equal bit for bit, experts equal for {compared} tokens" in caplog.text


def test_a_tie_that_one_side_breaks_otherwise_is_found():
    """Two experts get equal scores from every token; the rollout takes the last instead of the first."""
    models = [_model(QWEN3_MOE) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            for layer in model.layers:
                layer.mlp.router.weight[1] = layer.mlp.router.weight[0]
    exact = models[0].ops.route

    def from_the_end(logits, bias=None, **settings):
        nudged = logits.detach().clone()
        nudged[:, 1] += nudged[:, 1].abs() * 2**-20
        return exact(nudged, bias, **settings)

    set_ops(models[0], dataclasses.replace(models[0].ops, route=from_the_end))
    assert all(isinstance(layer.mlp, MoE) for layer in models[0].layers)
    found = _trained(models[1], Engine(model=models[0], max_model_len=64).generate(PROMPTS, PARAMS))
    assert found["bitwise/routes_different"] > 0
