"""A log-probability that is no number is refused by name, and costs nobody but its own request."""

import dataclasses

import numpy as np
import pytest
import torch
from rollout_models import bits, tiny_model

from vexact.rollout import Engine, NonFiniteLogprobError, SamplingParams
from vexact.rollout.sampling.sampler import StepOutput

FILTERS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1, "temperature": 0.6},
}


def _engine(model, **config):
    return Engine(model=model, eos_token_ids=[], **config)


def _poison(model, name, index, value):
    with torch.no_grad():
        model.get_parameter(name)[index] = value
    return model


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_non_finite_weight_is_named_whatever_the_filter(params, value):
    engine = _engine(_poison(tiny_model(), "layers.1.mlp.down_proj.weight", (3, 4), value))
    with pytest.raises(NonFiniteLogprobError) as caught:
        engine.generate([[5, 6]], SamplingParams(max_tokens=4, **params), ["mine"])
    text = str(caught.value)
    assert text.startswith("request mine, response position 0: token ")
    assert "log-probability nan" in text
    assert f"layers.1.mlp.down_proj.weight holds 1 non-finite number of 1536, the first {value} at [3, 4]" in text
    assert caught.value.request_ids == ["mine"]
    assert not engine.has_unfinished
    engine.check_idle()


def test_an_overflow_of_finite_weights_is_told_from_broken_weights():
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        model.norm.weight.fill_(60000.0)
    with pytest.raises(NonFiniteLogprobError, match=r"Every weight is finite.*overflows inside the float16 .*wider"):
        _engine(model).generate([[5, 6]], SamplingParams(max_tokens=2))


@pytest.mark.parametrize("row", [-np.inf, np.inf, np.nan])
@pytest.mark.parametrize("params", [{}, {"top_k": 3, "top_p": 0.9}])
def test_a_row_of_logits_without_a_number_is_refused(row, params):
    """Planted in the head alone: all entries, as a mask that leaves no token would do."""
    model = tiny_model()
    linear = model.ops.linear
    model.ops = dataclasses.replace(model.ops, linear=lambda *a, **k: torch.full_like(linear(*a, **k), row))
    with pytest.raises(NonFiniteLogprobError, match="Every weight is finite"):
        _engine(model).generate([[5, 6]], SamplingParams(max_tokens=2, **params))


def test_which_rows_are_numbers():
    logprobs = np.float32([-1.0, np.nan, -np.inf, np.inf, 0.0, -1.0, -1.0])
    min_logits = np.float32([-np.inf, -np.inf, -np.inf, 0.0, 1.5, np.nan, np.inf])
    output = StepOutput(np.arange(7), logprobs, min_logits)
    assert output.finite().tolist() == [True, False, False, False, True, False, False]
    assert output.rows(output.finite()).token_ids.tolist() == [0, 4]


def test_a_threshold_that_is_no_number_is_refused(monkeypatch):
    engine = _engine(tiny_model())
    engine._runner.on_sampled = lambda logits, sampling, sampled: torch.stack(
        [sampled[0], sampled[1], torch.full_like(sampled[2].view(torch.float32), torch.nan).view(torch.int32)]
    )
    with pytest.raises(NonFiniteLogprobError, match=r"log-probability -[\d.]+ and threshold nan"):
        engine.generate([[5, 6]], SamplingParams(max_tokens=2, top_k=4))


# Token 7 has an embedding that is no number; the head is another matrix, so only prompts with 7 meet it.
PROMPTS = {"a": [1, 2, 3], "bad": [4, 7, 5], "b": [9, 8], "worse": [7], "c": [1, 2, 3, 4, 5, 6]}


def _partly_poisoned(**config):
    model = tiny_model(tie_word_embeddings=False)
    return _engine(_poison(model, "embed_tokens.weight", 7, np.nan), **config)


def _healthy(params):
    names = [name for name in PROMPTS if name not in ("bad", "worse")]
    engine = _engine(tiny_model(tie_word_embeddings=False))
    return {s.request_id: s for s in engine.generate([PROMPTS[name] for name in names], params, names)}


@pytest.mark.parametrize(
    "config", [{}, {"page_size": 2, "num_pages": 12}, {"max_num_batched_tokens": 4}, {"async_scheduling": True}]
)
def test_a_poisoned_request_leaves_its_batch_mates_alone(config):
    params = SamplingParams(max_tokens=6, top_k=9)
    engine = _partly_poisoned(**config)
    for name, prompt in PROMPTS.items():
        engine.add_request(prompt, params, name)
    refused, finished = [], {}
    while engine.has_unfinished:
        try:
            samples = engine.step()
        except NonFiniteLogprobError as error:
            refused += error.request_ids
            samples = error.samples
        finished |= {sample.request_id: sample for sample in samples}
    engine.check_idle()
    assert sorted(refused) == ["bad", "worse"]
    expected = _healthy(params)
    assert finished.keys() == expected.keys()
    for name, sample in expected.items():
        if name in ("a", "b", "c"):
            assert finished[name].token_ids == sample.token_ids
            assert bits(finished[name].logprobs) == bits(sample.logprobs)
    engine.add_request([7, 1], params, "bad")  # the id is free again
    assert engine.abort_all() == ["bad"]


def test_generate_hands_over_what_was_finished():
    """One slot at a time: two requests end before the poisoned one is met."""
    engine = _partly_poisoned(max_num_seqs=1)
    params = SamplingParams(max_tokens=3)
    with pytest.raises(NonFiniteLogprobError, match="request bad, response position 0") as caught:
        engine.generate([PROMPTS[name] for name in ("a", "b", "bad", "c")], params, ["a", "b", "bad", "c"])
    assert [sample.request_id for sample in caught.value.samples] == ["a", "b"]
    expected = _healthy(params)
    for sample in caught.value.samples:
        assert bits(sample.logprobs) == bits(expected[sample.request_id].logprobs)
    assert not engine.has_unfinished
    engine.check_idle()


def test_the_engine_recovers_with_new_weights():
    """Pages that held keys and values of no number are used again, half filled."""
    model, healthy = tiny_model(), tiny_model(seed=1)
    engine = _engine(_poison(model, "layers.0.mlp.down_proj.weight", (0, 0), np.nan), page_size=8)
    prompts, params = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9]], SamplingParams(max_tokens=9)
    with pytest.raises(NonFiniteLogprobError, match="and 1 more request"):
        engine.generate(prompts, params)
    engine.update_weights(healthy.named_parameters(), 1)
    samples = engine.generate(prompts, params, ["x", "y"])
    fresh = _engine(tiny_model(seed=1), page_size=8).generate(prompts, params, ["x", "y"])
    assert [bits(s.logprobs) for s in samples] == [bits(s.logprobs) for s in fresh]


@pytest.mark.parametrize("ops", ["invariant", "stock"])
def test_stock_operators_are_held_to_the_same(ops):
    engine = _engine(_poison(tiny_model(ops=ops), "norm.weight", 0, np.inf))
    with pytest.raises(NonFiniteLogprobError, match=r"norm\.weight holds 1 non-finite number of 32, the first inf"):
        engine.generate([[5, 6]], SamplingParams(max_tokens=2))
