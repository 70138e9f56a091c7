"""What may enter the engine, what a refused request leaves behind (nothing), and which tokens end a response."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_models import VOCAB, LetterTokenizer, bits, tiny_config, tiny_model
from stop_tokenizers import TURN, byte_level

from vexact.models import save_hf
from vexact.rollout import Engine, SamplingParams

FREE = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def text_model():
    """Room for every token of the byte tokenizer; its own configuration names no end-of-sequence token."""
    return tiny_model(vocab_size=310, eos_token_id=None)


def make(model, **config):
    return Engine(model=model, **({"max_model_len": 96, "page_size": 4} | config))


def samples(engine):
    return [(s.request_id, s.token_ids, bits(s.logprobs)) for s in engine.generate([[1, 2, 3]], FREE)]


@pytest.mark.parametrize(
    ("prompt", "params", "name", "words"),
    [
        ([1], SamplingParams(stop_token_ids=[VOCAB]), None, [f"stop_token_ids holds {VOCAB}", f"0 to {VOCAB - 1}"]),
        ([1], SamplingParams(stop_token_ids=[3, 2**63]), None, [f"holds {2**63}", "never sampled"]),
        ([1], SamplingParams(stop_token_ids=[2**31], n=3), "r", ["'r'", f"holds {2**31}"]),
        ([1, 2**64], FREE, None, [f"prompt token id {2**64} is outside"]),
        ([2**63, -1], FREE, None, ["prompt token id -1 is outside"]),
        ([1, 2.5], FREE, None, ["integers", "float64"]),
        ([[1], [2, 3]], FREE, None, ["one flat list"]),
        ([True, False], FREE, None, ["bool"]),
        ("text", FREE, None, ["list of token ids", "'text'", "tokenise the text first"]),
        (b"text", FREE, None, ["list of token ids", "tokenise the text first"]),
        (None, FREE, None, ["non-empty list"]),
        ([1], {"max_tokens": 3}, None, ["SamplingParams", "dict"]),
        ([1], FREE, 7, ["request id 7", "string"]),
        ([1], FREE, "", ["request id ''", "string"]),
        ([1], FREE, "\ud800", [r"request id '\ud800'", "Unicode"]),
        ([1], SamplingParams(n=2, max_tokens=8), "used", ["'used/1'", "already running"]),
    ],
)
def test_a_refused_request_leaves_nothing_behind(model, prompt, params, name, words):
    engine, untouched = make(model), make(model)
    if name == "used":
        engine.add_request([5], FREE, "used/1")
    with pytest.raises(ValueError, match=r".") as error:
        engine.add_request(prompt, params, name)
    for word in words:
        assert word in str(error.value)
    engine.abort_all()
    engine.check_idle()
    assert samples(engine) == samples(untouched)  # the counter that names requests has not moved either
    engine.generate([[5]], SamplingParams(n=2, max_tokens=2), ["used"])


def test_a_call_that_is_refused_gives_no_later_prompt_another_name(model):
    """The names that the engine gives decide what is drawn."""
    engine, untouched = make(model), make(model)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.generate([[1], [2], [VOCAB]], FREE)
    assert samples(engine) == samples(untouched)


def test_if_one_of_n_cannot_be_queued_none_is(model, monkeypatch):
    engine = make(model)
    add, calls = engine._scheduler.add, []

    def fail_on_the_third(request):
        calls.append(request.request_id)
        if len(calls) == 3:
            raise MemoryError
        add(request)

    monkeypatch.setattr(engine._scheduler, "add", fail_on_the_third)
    engine.add_request([4], FREE, "first")
    with pytest.raises(MemoryError):
        engine.add_request([5], SamplingParams(n=4, max_tokens=3), "r")
    monkeypatch.undo()
    assert engine.abort_all() == ["first"]
    engine.check_idle()
    assert len(engine.generate([[5]], SamplingParams(n=4, max_tokens=3), ["r"])) == 4


def test_if_one_of_n_cannot_be_made_no_id_is_taken(model, monkeypatch):
    engine = make(model, tokenizer=LetterTokenizer())
    build, calls = engine._intake._request, []

    def fail_on_the_second(*arguments):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise MemoryError
        return build(*arguments)

    monkeypatch.setattr(engine._intake, "_request", fail_on_the_second)
    with pytest.raises(MemoryError):
        engine.add_request([5], SamplingParams(n=3, stop="zz"), "r")
    monkeypatch.undo()
    assert not engine.has_unfinished
    assert len(engine.generate([[5]], SamplingParams(n=3, stop="zz"), ["r"])) == 3


def force(engine, *tokens):
    """Sample these, one per step, the last one again and again."""
    left = list(tokens)

    def observe(logits, _):
        token = left.pop(0) if len(left) > 1 else left[0]
        logits.fill_(-50.0)[:, token].fill_(50.0)

    engine.observe_logits(observe)


def answer(engine, text, **params):
    """The sample when the model is made to write ``text``."""
    tokens = text if isinstance(text, list) else byte_level().encode(text, add_special_tokens=False)
    force(engine, *tokens)
    (sample,) = engine.generate([[5, 6]], SamplingParams(max_tokens=len(tokens), **params))
    return sample


@pytest.mark.parametrize(
    ("written", "stop", "text", "num_tokens"),
    [
        (f"ab{TURN}cd", TURN, "ab", 3),
        (f"ab\n{TURN}cd", f"\n{TURN}", "ab", 4),
        ("a<eos>bcd", "<eos>", "a", 2),
        (f"a{TURN}bcd", "bc", "a", 4),
        ("naïve", "ï", "na", 4),
        ("abcd", ["cd", "bcd"], "a", 4),
    ],
)
def test_a_stop_string_ends_the_response_and_is_cut(text_model, written, stop, text, num_tokens):
    engine = make(text_model, tokenizer=byte_level(), eos_token_ids=[])
    sample = answer(engine, written, stop=stop)
    assert (sample.finish_reason, sample.text, len(sample.token_ids)) == ("stop", text, num_tokens)
    assert sample.stop_reason in stop


def test_text_of_a_response_cut_inside_a_character(text_model):
    engine = make(text_model, tokenizer=byte_level())
    tokens = byte_level().encode("a日", add_special_tokens=False)[:-1]
    sample = answer(engine, tokens, stop="zz")
    assert (sample.finish_reason, sample.stop_reason) == ("length", None)
    assert sample.text == byte_level().decode(tokens, skip_special_tokens=True) == "a\ufffd"


def test_the_tokenizers_end_token_ends_a_response_where_the_model_names_none(text_model):
    engine = make(text_model, tokenizer=byte_level())
    eos = byte_level().eos_token_id
    assert engine.eos_token_ids == (eos,)
    sample = answer(engine, "ab<eos>cd")
    assert (sample.finish_reason, sample.stop_reason, sample.text) == ("stop", eos, "ab")
    ignored = answer(engine, "ab<eos>cd", ignore_eos=True)
    assert (ignored.finish_reason, ignored.text) == ("length", "abcd")
    assert make(text_model).eos_token_ids == ()


def test_end_tokens_of_both_configurations_and_the_tokenizer_count(tmp_path):
    config = tiny_config(vocab_size=310, eos_token_id=[7, 8])
    save_hf(tiny_model(vocab_size=310).named_parameters(), config, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    byte_level().save_pretrained(tmp_path)
    engine = Engine(tmp_path, device="cpu", max_model_len=64)
    assert sorted(engine.eos_token_ids) == [byte_level().eos_token_id, 7, 8, 9]
    assert Engine(tmp_path, device="cpu", max_model_len=64, eos_token_ids=np.array([3])).eos_token_ids == (3,)


def test_an_end_token_the_model_cannot_sample_is_named(caplog):
    class FarTokenizer(LetterTokenizer):
        eos_token_id = VOCAB + 3

    engine = make(tiny_model(eos_token_id=5), tokenizer=FarTokenizer())
    assert engine.eos_token_ids == (5,)
    assert f"end-of-sequence tokens [{VOCAB + 3}] are outside the model's vocabulary of {VOCAB}" in caplog.text


@pytest.mark.parametrize("bad", [VOCAB, -1, 2**63, True, "2", 1.0])
def test_a_given_end_token_must_be_in_the_vocabulary(model, bad):
    with pytest.raises(ValueError, match=r"eos_token_ids holds .*ids 0 to 96"):
        make(model, eos_token_ids=[2, bad])
