"""No knob of the engine may change a token or a bit, and the bits are those of the packed training forward."""

from __future__ import annotations

import random

import pytest
import torch
from rollout_models import VOCAB, bits, tiny_model, training_logits, training_logprobs

from vexact.ops import SamplingTensors
from vexact.ops import sample as sample_op
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.requests.request import request_seed

MAX_LEN = 192
NUM_REQUESTS = 14
NUM_GROUPS, CASES_PER_GROUP = 3, 20


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def workload():
    """Requests whose prompts cross page and key-block edges, many sharing a prefix, with every kind of sampling."""
    rng = random.Random(7)
    shared = [rng.randrange(VOCAB - 1) for _ in range(150)]
    requests = []
    for index in range(NUM_REQUESTS):
        keep = rng.choice([0, 0, 16, 33, 63, 64, 65, 127, 128])
        tail = rng.randint(1, 20)
        prompt = shared[:keep] + [rng.randrange(VOCAB - 1) for _ in range(tail)]
        params = SamplingParams(
            n=rng.choice([1, 3]),
            max_tokens=rng.choice([1, 4, 9, 17]),
            temperature=rng.choice([0.0, 0.6, 0.7, 1.0, 1.3]),
            top_k=rng.choice([-1, -1, 1, 5, 40]),
            top_p=rng.choice([1.0, 1.0, 0.5, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=rng.choice([None, None, 3]),
            stop_token_ids=rng.choice([None, None, None, [5, 6]]),
            ignore_eos=rng.random() < 0.5,
        )
        requests.append((f"r{index}", prompt, params))
    return requests


def fingerprint(sample):
    return (sample.token_ids, bits(sample.logprobs), bits(sample.min_logits), sample.finish_reason, sample.stop_reason)


@pytest.fixture(scope="module")
def reference(model):
    """One request at a time, one page per sequence, nothing shared."""
    engine = Engine(
        model=model, page_size=MAX_LEN, max_num_seqs=1, max_model_len=MAX_LEN, enable_prefix_caching=False, seed=11
    )
    expected = {}
    for request_id, prompt, params in workload():
        for sample in engine.generate([prompt], params, [request_id]):
            expected[sample.request_id] = sample
    return expected


def draw_engine(rng, requests):
    """Every performance knob at random; at the tightest, pages for the longest of the requests and no more."""
    page_size = rng.choice([1, 1, 1, 2, 2, 3, 8, 16, 64, 100])
    longest = max(len(prompt) + params.max_tokens - 1 for _, prompt, params in requests)
    chunked = rng.random() < 0.85
    return {
        "page_size": page_size,
        "num_pages": int(-(-longest // page_size) * rng.choice([1.0, 1.0, 1.05, 1.1, 1.2, 4.0])),
        "max_num_seqs": rng.choice([2, 5, 16, 16]),
        "max_num_batched_tokens": rng.choice([5, 13, 31, 64, 100, 4096]) if chunked else MAX_LEN,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": rng.random() < 0.7,
        "async_scheduling": rng.random() < 0.5,
    }


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_no_knob_changes_a_bit(model, reference, group):
    """Each group of cases must also preempt, share and chunk, or it would prove little."""
    preemptions = shared = chunked = 0.0
    for case in range(CASES_PER_GROUP):
        rng = random.Random(1000 * group + case)
        requests = rng.sample(workload(), rng.randint(3, 6))
        knobs = draw_engine(rng, requests)
        engine = Engine(model=model, max_model_len=MAX_LEN, seed=11, **knobs)
        ids, prompts, params = map(list, zip(*requests))
        samples = engine.generate(prompts, params, ids)
        assert len(samples) == sum(param.n for param in params)
        for sample in samples:
            assert fingerprint(sample) == fingerprint(reference[sample.request_id]), (knobs, sample.request_id)
        stats = engine.stats()
        preemptions += stats["rollout/preemptions"]
        shared += stats["rollout/prefix_hit_ratio"] > 0
        chunked += max(map(len, prompts)) > knobs["max_num_batched_tokens"]
    assert preemptions >= 4
    assert shared >= 6
    assert chunked >= 6


def test_the_packed_training_forward_has_the_same_bits(model, reference):
    samples = list(reference.values())
    assert sum(len(sample.token_ids) for sample in samples) > 100
    assert any((sample.min_logits > -1e30).any() for sample in samples), "no truncated sample in the workload"
    for sample, logprobs in zip(samples, training_logprobs(model, samples)):
        assert bits(sample.logprobs) == bits(logprobs), sample.request_id


def test_a_token_is_the_draw_of_its_seed_and_position(model, reference):
    """One packed forward and one call of the sampling operator give every token of every request."""
    params = {request_id: params for request_id, _, params in workload()}
    logits, rows = training_logits(model, list(reference.values()))
    columns = {name: [] for name in SamplingTensors._fields}
    for sample in reference.values():
        request = params[sample.request_id.split("/")[0]]
        seed = request_seed(11 if request.seed is None else request.seed, sample.request_id)
        for index in range(len(sample.token_ids)):
            values = (request.temperature, request.top_k, request.top_p, request.min_p, seed)
            for column, value in zip(columns.values(), (*values, len(sample.prompt_token_ids) + index)):
                column.append(value)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    tensors = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns.values(), dtypes)]
    drawn = sample_op(logits[rows], SamplingTensors(*tensors))
    assert drawn.token_ids.tolist() == [token for sample in reference.values() for token in sample.token_ids]


def test_bf16_and_an_untied_head_match_the_training_forward():
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=False)
    engine = Engine(model=model, page_size=1, num_pages=160, max_model_len=MAX_LEN, max_num_batched_tokens=23)
    requests = workload()[:6]
    samples = engine.generate([prompt for _, prompt, _ in requests], [params for _, _, params in requests])
    assert engine.stats()["rollout/preemptions"] > 0
    for sample, logprobs in zip(samples, training_logprobs(model, samples)):
        assert bits(sample.logprobs) == bits(logprobs)


def test_arrival_during_decoding_changes_nothing(model, reference):
    engine = Engine(model=model, page_size=8, num_pages=60, max_model_len=MAX_LEN, max_num_batched_tokens=40, seed=11)
    rng = random.Random(3)
    waiting = workload()
    finished = []
    while waiting or engine.has_unfinished:
        if waiting and rng.random() < 0.4:
            request_id, prompt, params = waiting.pop(rng.randrange(len(waiting)))
            engine.add_request(prompt, params, request_id)
        finished += engine.step()
    assert sorted(sample.request_id for sample in finished) == sorted(reference)
    for sample in finished:
        assert fingerprint(sample) == fingerprint(reference[sample.request_id])


def test_two_seeds_or_two_ids_give_different_tokens(model):
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    tokens = [
        Engine(model=model, max_model_len=64, seed=seed).generate([[1, 2, 3]], params, [name])[0].token_ids
        for seed, name in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert len(set(tokens)) == 3


def test_the_stock_operators_are_not_exact():
    """The baseline must be able to fail, or the comparison above proves nothing."""
    exact, stock = tiny_model(), tiny_model(ops="stock")
    engine = Engine(model=stock, max_model_len=MAX_LEN, batch_invariant=False)
    prompts = [prompt for _, prompt, _ in workload()]
    samples = engine.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
    different = sum(
        one != other
        for sample, logprobs in zip(samples, training_logprobs(exact, samples))
        for one, other in zip(bits(sample.logprobs), bits(logprobs))
    )
    assert different > 0
