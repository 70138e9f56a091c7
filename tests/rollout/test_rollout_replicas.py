"""Several engines as one: prompts dealt by load, statistics joined, ids that do not depend on the split."""

from __future__ import annotations

import random

import pytest
from rollout_models import VOCAB, bits, tiny_model

from vexact.rollout import Engine, SamplingParams
from vexact.rollout.replicas import split_prompts
from vexact.rollout.stats import EngineStats, merge_stats


def loads(shares, lengths, counts, mean):
    return [sum(lengths[i] + counts[i] * mean for i in share) for share in shares]


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_dealt_once_and_loads_are_balanced(seed):
    rng = random.Random(seed)
    replicas = rng.randint(1, 6)
    lengths = [rng.choice([1, 20, 300, rng.randint(1, 2000)]) for _ in range(rng.randint(1, 60))]
    counts = [rng.randint(1, 8) for _ in lengths]
    mean = rng.choice([0.0, 12.5, 700.0])
    shares = split_prompts(lengths, counts, [100] * replicas, mean)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert sum(not share for share in shares) == max(0, replicas - len(lengths))
    found = loads(shares, lengths, counts, mean)
    # longest first ends within 4/3 of the best split, which is no better than the mean or the largest prompt
    largest = max(loads([[i] for i in range(len(lengths))], lengths, counts, mean))
    two_in_one = sorted(loads([[i] for i in range(len(lengths))], lengths, counts, mean))[::-1]
    floor = max(
        sum(found) / replicas, largest, sum(two_in_one[replicas - 1 : replicas + 1]) if len(lengths) > replicas else 0
    )
    assert max(found) <= 4 / 3 * floor + 1e-6
    assert shares == split_prompts(tuple(lengths), tuple(counts), (100,) * replicas, mean)


def test_a_replica_with_more_pages_gets_more_and_one_without_any_none():
    lengths = [10] * 40
    sizes = [len(share) for share in split_prompts(lengths, 4, [300, 100, 0], 50.0)]
    assert sizes == [30, 10, 0]
    assert split_prompts([5, 7], 1, [10, 10, 10], 0.0) == [[1], [0], []]
    assert split_prompts([], 1, [10, 10], 0.0) == [[], []]
    assert split_prompts([5, 1000, 6], 1, [1, 99], 10.0) == [[2], [0, 1]]  # one page is still a replica


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1], [5], 0.0), "n has 1 entries for 2 prompts"),
        (([1], 1, [], 0.0), r"free_pages=\[\] must hold a positive number"),
        (([1], 1, [0, 0], 0.0), r"free_pages=\[0, 0\] must hold a positive number"),
        (([1], 1, [4, -1], 0.0), r"free_pages=\[4, -1\]"),
        (([1], 1, [4], float("nan")), "mean_response_length=nan must be at least 0"),
    ],
)
def test_splits_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_prompts(*arguments)


def test_statistics_of_replicas_are_those_of_one_engine_that_worked_at_once():
    first = EngineStats(
        num_steps=10,
        num_tokens=300,
        step_seconds=2.0,
        execute_seconds=1.5,
        wait_seconds=1.0,
        num_ahead=9,
        max_used_pages=30,
        num_pages=100,
        num_preemptions=2,
        num_prefix_queried=100,
        num_prefix_hits=50,
        num_replays=8,
    )
    second = EngineStats(
        num_steps=30,
        num_tokens=100,
        step_seconds=4.0,
        execute_seconds=3.9,
        wait_seconds=3.0,
        num_ahead=15,
        max_used_pages=35,
        num_pages=200,
        num_preemptions=1,
        num_prefix_queried=300,
        num_prefix_hits=50,
        num_replays=30,
    )
    expected = {
        "rollout/kv_usage": 0.3,  # the fuller one's, not the one with more pages
        "rollout/preemptions": 3.0,
        "rollout/prefix_hit_ratio": 0.25,
        "rollout/decode_tokens_per_s": 100.0,  # 400 in the 4 s that the slower one took
        "rollout/host_us_per_step": pytest.approx(1e6 * 0.6 / 40),
        "rollout/wait_us_per_step": pytest.approx(1e6 * 4.0 / 40),
        "rollout/async_ratio": 24 / 40,
        "rollout/graph_ratio": 38 / 40,
        "rollout/num_tokens": 400.0,
    }
    merged = merge_stats([first, second])
    assert merged.metrics() == expected
    assert merge_stats([second, first]).metrics() == expected
    assert merge_stats([merged]).metrics() == expected
    assert merge_stats([first]).metrics() == first.metrics()
    idle = merge_stats([first, EngineStats(num_pages=100)])
    assert idle.metrics() == first.metrics()
    assert merge_stats([EngineStats(), EngineStats()]).metrics() == EngineStats().metrics()
    assert set(EngineStats().metrics().values()) == {0.0}
    with pytest.raises(ValueError, match="of no replicas"):
        merge_stats([])


def test_two_replicas_give_the_samples_and_counters_of_one_engine():
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 40))] for _ in range(7)]
    params = SamplingParams(n=2, max_tokens=8, temperature=0.9)
    model = tiny_model()
    one, *two = (Engine(model=model, max_model_len=64, num_pages=64, page_size=4) for _ in range(3))
    for engine in (one, *two):
        engine.num_named = 3
    expected = one.generate(prompts, params)
    assert one.num_named == 10
    shares = split_prompts([len(p) for p in prompts], 2, [engine.num_free_pages for engine in two], 8.0)
    assert all(shares)
    found = {}
    for engine, share in zip(two, shares, strict=True):
        ids = [str(engine.num_named + index) for index in share]
        samples = engine.generate([prompts[i] for i in share], params, ids)
        found.update((sample.request_id, sample) for sample in samples)
    for sample in expected:
        other = found[sample.request_id]
        assert (other.token_ids, bits(other.logprobs)) == (sample.token_ids, bits(sample.logprobs))
    alone, merged = one.take_stats(), merge_stats([engine.take_stats() for engine in two])
    for name in ("num_tokens", "num_prefix_queried", "num_prefix_hits", "num_preemptions"):
        assert getattr(merged, name) == getattr(alone, name), name
    assert one.take_stats().num_tokens == 0
