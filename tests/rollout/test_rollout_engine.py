"""The engine's public face: stop conditions, errors, weights, statistics."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from rollout_models import VOCAB, LetterTokenizer, bits, tiny_config, tiny_model, training_logprobs

from vexact.models import save_hf
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.scheduling.block_manager import KVIntegrityError

EOS = VOCAB - 1
FREE = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def make(model, **config):
    return Engine(model=model, **({"max_model_len": 96, "page_size": 4} | config))


def first(engine, params, prompt=(1, 2, 3)):
    return engine.generate([list(prompt)], params, ["r"])[0]


def test_a_sample_carries_what_was_sampled(model):
    sample = first(make(model), FREE)
    assert (sample.request_id, sample.prompt_token_ids, len(sample.token_ids)) == ("r", (1, 2, 3), 24)
    assert sample.logprobs.dtype == sample.min_logits.dtype == np.float32
    assert sample.logprobs.shape == sample.min_logits.shape == (24,)
    assert (sample.finish_reason, sample.stop_reason, sample.text) == ("length", None, None)
    assert (sample.logprobs < 0).all()
    assert (sample.min_logits == -np.inf).all()


def test_a_stop_token_ends_the_request_and_is_kept(model):
    free = first(make(model), FREE)
    stop = free.token_ids[10]
    end = free.token_ids.index(stop) + 1
    other = next(token for token in range(VOCAB) if token not in free.token_ids)
    sample = first(make(model), SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[other, stop]))
    assert sample.token_ids == free.token_ids[:end]
    assert bits(sample.logprobs) == bits(free.logprobs[:end])
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)


def test_eos_ends_unless_ignored(model):
    free = first(make(model), FREE)
    eos = free.token_ids[7]
    engine = make(model, eos_token_ids=[eos])
    sample = first(engine, SamplingParams(max_tokens=24))
    assert sample.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", eos)
    assert first(engine, FREE).token_ids == free.token_ids


def test_eos_defaults_to_the_model_config():
    engine = make(tiny_model(eos_token_id=list(range(VOCAB))))
    assert len(first(engine, SamplingParams(max_tokens=24)).token_ids) == 1


def test_a_stop_token_on_the_last_allowed_position_is_a_stop(model):
    free = first(make(model), FREE)
    at = free.token_ids.index(free.token_ids[5])
    params = SamplingParams(max_tokens=at + 1, ignore_eos=True, stop_token_ids=[free.token_ids[at]])
    assert first(make(model), params).finish_reason == "stop"


def test_a_stop_string_cuts_the_text_and_not_the_tokens(model):
    engine = make(model, tokenizer=LetterTokenizer())
    free = first(engine, FREE)
    stop = free.text[6:9]
    sample = first(engine, SamplingParams(max_tokens=24, ignore_eos=True, stop=stop))
    assert sample.text == free.text[: free.text.index(stop)]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.token_ids == free.token_ids[: len(sample.token_ids)]
    decoded = LetterTokenizer().decode(sample.token_ids)
    assert decoded.endswith(stop)
    assert stop not in decoded[:-1]


def test_text_leaves_the_stop_token_out(model):
    engine = make(model, tokenizer=LetterTokenizer())
    free = first(engine, FREE)
    sample = first(engine, SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[free.token_ids[3]]))
    assert sample.text == LetterTokenizer().decode(sample.token_ids[:-1])


def test_n_samples_differ_and_come_in_order(model):
    engine = make(model)
    params = [SamplingParams(n=3, max_tokens=12, ignore_eos=True), SamplingParams(max_tokens=4, ignore_eos=True)]
    samples = engine.generate([[1, 2], [3]], params, ["a", "b"])
    assert [sample.request_id for sample in samples] == ["a/0", "a/1", "a/2", "b"]
    assert len({sample.token_ids for sample in samples[:3]}) == 3


def test_greedy_is_the_argmax_at_temperature_one(model):
    samples = make(model).generate([[1, 2, 3]], SamplingParams(max_tokens=12, temperature=0, top_k=3, ignore_eos=True))
    (expected,) = training_logprobs(model, samples)
    assert bits(samples[0].logprobs) == bits(expected)
    again = first(make(model, seed=99), SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    assert again.token_ids == samples[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], FREE, ["non-empty"]),
        ([1.5], FREE, ["float64", "tokenise"]),
        ([1, VOCAB], FREE, [f"token id {VOCAB}", f"vocabulary of {VOCAB}"]),
        ([-3, 1], FREE, ["token id -3"]),
        ([1] * 90, FREE, ["90 prompt tokens", "max_tokens=24", "114", "max_model_len=96"]),
        ([1] * 30, FREE, ["30 prompt tokens", "need 14 KV pages of 4 tokens", "the engine has 13", "num_pages"]),
        ([1], SamplingParams(stop="x"), ["stop=('x',)", "tokenizer"]),
    ],
)
def test_a_request_that_cannot_run_is_refused(model, prompt, params, words):
    engine = make(model, num_pages=13)
    with pytest.raises(ValueError, match=r"prompt|request") as error:
        engine.generate([[1], prompt], params if params.stop else [FREE, params])
    for word in words:
        assert word in str(error.value)
    assert not engine.has_unfinished
    assert len(engine.generate([[1] * 29], FREE)) == 1  # exactly as much as fits, and the engine is not broken


def test_lengths_and_ids_are_checked(model):
    engine = make(model)
    with pytest.raises(ValueError, match="request_ids has 1 entries for 2 prompts"):
        engine.generate([[1], [2]], FREE, ["a"])
    with pytest.raises(ValueError, match="sampling_params has 3 entries for 1 prompts"):
        engine.generate([[1]], [FREE] * 3)
    with pytest.raises(ValueError, match="'a' is already running"):
        engine.generate([[1], [2]], FREE, ["a", "a"])
    engine.add_request([1], FREE, "a")
    with pytest.raises(RuntimeError, match="idle engine"):
        engine.generate([[1]], FREE)
    assert engine.abort_all() == ["a"]
    engine.check_idle()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"page_size": 0}, "page_size=0 must be a positive integer"),
        ({"num_pages": 4, "kv_cache_bytes": 1000}, "num_pages=4 and kv_cache_bytes=1000 both size"),
        ({"kv_cache_bytes": 10}, "10 bytes cannot hold one page"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5 must be in"),
        ({"max_model_len": 1000}, "max_model_len=1000 exceeds the model's max_position_embeddings=512"),
        ({"max_model_len": 1}, "max_model_len=1 must be at least 2"),
        ({"async_scheduling": "on"}, "async_scheduling='on' must be 'auto', True or False"),
        ({"async_scheduling": 1}, "async_scheduling=1 must be 'auto', True or False"),
        ({"batch_invariant": "false"}, "batch_invariant='false' must be True or False"),
        ({"enable_prefix_caching": None}, "enable_prefix_caching=None must be True or False"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization='0.5' must be in"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 95}, "max_num_batched_tokens=95 is less than"),
    ],
)
def test_a_bad_engine_config_is_refused(model, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(model, **config)


def test_exactly_one_source_of_weights():
    with pytest.raises(ValueError, match="exactly one"):
        Engine()
    with pytest.raises(ValueError, match="dtype='float8' is unknown"):
        Engine("nowhere", dtype="float8")


def test_kv_bytes_become_pages(model):
    # 2 (k, v) x 2 layers x 2 heads x 8 x 4 bytes x 4 tokens per page = 1024 bytes
    assert make(model, kv_cache_bytes=10 * 1024 + 7).num_pages == 10
    assert make(model, max_num_seqs=2).num_pages == 2 * 96 // 4


def test_new_weights_change_the_samples_and_empty_the_cache():
    prompt = list(range(20))
    engine, other = make(tiny_model(0)), tiny_model(1)
    before = first(engine, FREE, prompt)
    engine.update_weights(other.named_parameters(), version=5)
    after = first(engine, FREE, prompt)
    assert (before.weights_version, after.weights_version, engine.weights_version) == (0, 5, 5)
    fresh = first(make(tiny_model(1)), FREE, prompt)
    assert (after.token_ids, bits(after.logprobs)) == (fresh.token_ids, bits(fresh.logprobs))
    assert after.token_ids != before.token_ids


def test_an_update_that_does_not_fit_lists_every_problem():
    engine = make(tiny_model(0))
    named = dict(tiny_model(1).named_parameters())
    names = list(named)
    del named[names[3]]
    named[names[1]] = torch.zeros(3)
    named[names[2]] = named[names[2]].double()
    named["ghost"] = torch.zeros(1)
    with pytest.raises(ValueError, match="does not match the model") as error:
        engine.update_weights(named.items(), version=1)
    for word in (f"missing '{names[3]}'", f"'{names[1]}' has shape (3,)", f"'{names[2]}' is torch.float64", "'ghost'"):
        assert word in str(error.value)
    with pytest.raises(RuntimeError, match="half way"):
        first(engine, FREE)
    engine.update_weights(tiny_model(1).named_parameters(), version=2)
    assert first(engine, FREE).weights_version == 2


def test_weights_do_not_change_under_running_requests(model):
    engine = make(model)
    engine.add_request([1], FREE)
    with pytest.raises(RuntimeError, match="unfinished requests"):
        engine.update_weights([], version=1)


def test_statistics_cover_the_time_since_the_last_call(model):
    engine = make(model, num_pages=48)
    prompts = [[9] * 33] * 4
    seen = []
    engine.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), on_step=lambda *args: seen.append(args))
    stats = engine.stats()
    assert stats["rollout/num_tokens"] == 32
    assert stats["rollout/prefix_hit_ratio"] == pytest.approx(3 * 32 / (4 * 33))
    # 8 shared pages, and per request 2 more for tokens 32 .. 39 (the 41st is never stored)
    assert stats["rollout/kv_usage"] == pytest.approx((8 + 4 * 2) / 48)
    assert stats["rollout/decode_tokens_per_s"] > 0
    assert stats["rollout/host_us_per_step"] > 0
    assert seen[-1] == (4, 32)
    assert seen == sorted(seen)
    assert set(engine.stats().values()) == {0.0}


def test_a_leaked_page_is_found_when_the_engine_is_idle(model):
    engine = make(model)
    engine._blocks.allocate()
    with pytest.raises(KVIntegrityError, match="1 still referenced"):
        first(engine, FREE)


def test_an_interrupt_leaves_a_usable_engine(model):
    engine = make(model)

    def interrupt(num_finished, num_tokens):
        if num_tokens >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3], [4]], FREE, ["r", "s"], on_step=interrupt)
    assert not engine.has_unfinished
    engine.check_idle()
    assert first(engine, FREE).token_ids == first(make(model), FREE).token_ids


def test_a_checkpoint_directory_loads_with_its_eos(model, tmp_path):
    save_hf(model.named_parameters(), tiny_config(), tmp_path)
    engine = Engine(str(tmp_path), device="cpu", max_model_len=96)
    assert engine.tokenizer is None
    assert first(engine, FREE).token_ids == first(make(model), FREE).token_ids
