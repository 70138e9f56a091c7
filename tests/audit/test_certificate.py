"""The self-test fits any engine, leaves it as it was, and says what it compared."""

import dataclasses
import json

import pytest
from audit_support import CONFIG, PAIR

from vexact.audit import environment
from vexact.audit.certificate import CertificateError, require_certificate, run_self_test
from vexact.audit.environment import tile_table_hash
from vexact.models import random_model
from vexact.ops import sample
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.sampling import sampler
from vexact.training import Actor, ActorConfig
from vexact.training.passes.redraw import Redraw


def _engine(**config):
    return Engine(model=random_model(CONFIG, seed=1), **config)


def _actor(**config):
    return Actor(random_model(CONFIG, seed=1), ActorConfig(**config))


@pytest.mark.parametrize(
    ("engine", "budget"),
    [({}, 16384), ({"max_model_len": 2}, 16384), ({"num_pages": 3, "page_size": 4}, 16384), ({}, 9)],
)
def test_it_fits_what_the_run_allows(engine, budget):
    comparison = run_self_test(_engine(**engine), _actor(ppo_max_token_len_per_gpu=budget)).comparison
    assert comparison.tokens_different == 0
    assert comparison.tokens_compared >= 5


def test_the_engine_is_left_as_it_was():
    engine, untouched = _engine(page_size=4), _engine(page_size=4)
    run_self_test(engine, _actor())
    assert engine.stats()["rollout/num_tokens"] == 0
    assert engine.weights_version == 0
    prompts = [list(range(30)), list(range(30))]
    ours, theirs = (e.generate(prompts, SamplingParams(max_tokens=9)) for e in (engine, untouched))
    assert [(s.request_id, s.token_ids) for s in ours] == [(s.request_id, s.token_ids) for s in theirs]
    assert engine.stats()["rollout/prefix_hit_ratio"] == untouched.stats()["rollout/prefix_hit_ratio"]


def test_other_weights_are_found(tmp_path):
    engine = Engine(model=random_model(CONFIG, seed=2))
    with pytest.raises(CertificateError, match="First: request certificate/0, response position 0, token"):
        require_certificate(engine, _actor(), tmp_path, "strict", **PAIR)
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written["exact"] is False
    assert written["comparison"]["first"]["request_id"] == "certificate/0"
    require_certificate(engine, _actor(), tmp_path, "off", **PAIR)
    assert not (tmp_path / "certificate.json").exists()


def test_a_lone_wrong_operator_is_found():
    engine = _engine()
    rope = engine.model.ops.rope
    shifted = dataclasses.replace(
        engine.model.ops, rope=lambda q, k, positions, table: rope(q, k, positions + 1, table)
    )
    for module in engine.model.modules():
        if hasattr(module, "ops"):
            module.ops = shifted
    assert run_self_test(engine, _actor()).comparison.tokens_different > 0


def test_a_sampler_that_draws_otherwise_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(sampler, "sample", lambda logits, params: sample(logits, params._replace(seed=params.seed + 1)))
    with pytest.raises(CertificateError, match=r"does not draw what its seeds say.*request certificate/\d"):
        require_certificate(_engine(), _actor(), tmp_path, "strict", **PAIR)
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert not written["exact"]
    assert written["comparison"]["tokens_different"] == 0 < written["draws"]["different"] < written["draws"]["redrawn"]


def test_draws_that_nobody_repeats_are_not_certified(monkeypatch, tmp_path):
    monkeypatch.setattr(Redraw, "watch", lambda self, batch, indices: batch)
    with pytest.raises(CertificateError, match=r"failed: 0 of \d+ draws were repeated"):
        require_certificate(_engine(), _actor(), tmp_path, "strict", **PAIR)
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert (written["exact"], written["draws"]["redrawn"], written["comparison"]["tokens_different"]) == (False, 0, 0)


def test_the_hash_is_stable_and_covers_the_tables(monkeypatch):
    before = tile_table_hash()
    assert tile_table_hash() == before
    for pattern in environment._CONSTANTS:  # without the files of any one of them the hash is another
        with monkeypatch.context() as patch:
            patch.setattr(environment, "_CONSTANTS", tuple(each for each in environment._CONSTANTS if each != pattern))
            assert tile_table_hash() != before


def test_constants_are_named_by_kind_of_kernel():
    assert set(environment.kernel_constants()) == {"attention", "linear", "linear_cross_entropy", "moe"}
    names = {file.name for file in environment._constant_files() if file.parent.name == "moe"}
    assert {"tiles.py", "router.py", "combine.py"} <= names
