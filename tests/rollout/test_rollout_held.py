"""Requests that a pause holds back: who of them is ended by an abort, a caller who leaves, a drain or the end."""

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from rollout_models import tiny_model

from vexact.rollout import Engine, SamplingParams
from vexact.rollout.async_engine import AsyncEngine
from vexact.rollout.stream import Ask, EngineClosedError, QueueFullError

ONE = SamplingParams(max_tokens=9, ignore_eos=True)
THREE = SamplingParams(max_tokens=9, n=3, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def direct(model):
    """What the three samples of "a" are when nobody interferes."""
    return Engine(model=model).generate([PROMPT], THREE, ["a"])


@pytest.fixture
def engine(model):
    driven = AsyncEngine(Engine(model=model, max_num_seqs=4, page_size=8, max_model_len=448), max_queue=2)
    yield driven
    driven.close()
    assert driven.num_unfinished == 0
    assert not any((driven._parts, driven._held, driven._live, driven._unstarted, driven._outbox))
    driven._engine.check_idle()


async def holds(engine, count):
    """Until so many requests are held back."""
    while await engine.run(lambda _: len(engine._held)) != count:
        await asyncio.sleep(0)


@asynccontextmanager
async def held(engine, *asks):
    """Tasks of requests, in their order, that a pause holds back until the end."""
    async with engine.paused():
        tasks = [asyncio.create_task(engine.generate(PROMPT, params, name)) for name, params in asks]
        await holds(engine, len(asks))
        yield tasks


def endings(samples):
    return {sample.request_id: (sample.finish_reason, len(sample.token_ids)) for sample in samples}


# asked for, and what ends of the requests "a" (three samples), "b" and "c"
ABORTS = [
    ("a/1", ["a/1"]),
    (["a/2", "b", "a/0"], ["a/0", "a/2", "b"]),
    (["a/0", "a"], ["a/0", "a/1", "a/2"]),
    (["b", "c"], ["b", "c"]),
    (["a/3", "a/", "a/01", "unknown"], []),
    ([], []),
]


@pytest.mark.parametrize(("ids", "ended"), ABORTS, ids=["one", "some", "all", "two whole", "unknown", "none"])
def test_what_is_named_ends_at_once_and_the_others_go_on_after_the_pause(engine, direct, ids, ended):
    async def scenario():
        async with held(engine, ("a", THREE), ("b", ONE), ("c", ONE)) as tasks:
            assert await engine.abort(ids) == ended
            assert engine.num_unfinished == 5 - len(ended)
            assert await engine.abort(ids) == [], "they have ended"
            assert not await engine.run(lambda engine: engine.has_unfinished), "nothing begins in a pause"
            whole = [task for task, names in zip(tasks, ({"a/0", "a/1", "a/2"}, {"b"}, {"c"})) if names <= {*ended}]
            for task in whole:
                await asyncio.wait_for(task, 60)
            assert [task for task in tasks if task.done()] == whole
        return [sample for task in tasks for sample in await task]

    samples = asyncio.run(scenario())
    names = [sample.request_id for sample in samples]
    assert names == ["a/0", "a/1", "a/2", "b", "c"]
    assert endings(samples) == {name: ("abort", 0) if name in ended else ("length", 9) for name in names}
    for ours, theirs in zip(samples, direct):
        if ours.request_id not in ended:
            assert ours.token_ids == theirs.token_ids
            assert np.array_equal(ours.logprobs.view(np.int32), theirs.logprobs.view(np.int32))


def test_an_aborted_sample_comes_first_in_its_stream(engine):
    async def read(found):
        async with engine.stream_all([Ask([1], ONE, "x"), Ask(PROMPT, THREE, "a")]) as deltas:
            async for delta in deltas:
                found.append((delta.index, len(delta.token_ids), delta.sample and delta.sample.finish_reason))

    async def scenario():
        found = []
        async with engine.paused():
            reading = asyncio.create_task(read(found))
            await holds(engine, 2)
            assert await engine.abort("a/0") == ["a/0"]
        await reading
        return found

    first, *rest = asyncio.run(scenario())
    assert first == (1, 0, "abort")
    assert {index: sum(count for of, count, _ in rest if of == index) for index in range(4)} == {0: 9, 1: 0, 2: 9, 3: 9}
    assert [reason for _, _, reason in rest if reason] == ["length"] * 3


def test_what_begins_after_the_pause_is_aborted_as_others_are(engine):
    async def scenario():
        may_step = threading.Event()
        async with held(engine, ("a", THREE)) as (task,):
            assert await engine.abort("a/0") == ["a/0"]
            stopped = engine.submit(lambda _: may_step.wait())  # resume and abort come between the same two steps
            resuming, aborting = (asyncio.create_task(call) for call in (engine.resume(), engine.abort(["a/0", "a/2"])))
            await asyncio.sleep(0)
            may_step.set()
            await resuming
            assert await aborting == ["a/2"]
            await asyncio.wrap_future(stopped)
        return await task

    samples = asyncio.run(scenario())
    assert endings(samples) == {"a/0": ("abort", 0), "a/1": ("length", 9), "a/2": ("abort", 0)}


def test_an_abort_needs_neither_weights_nor_cache(model):
    """They are away, or half new, in the very pauses that hold requests back."""
    weights = [(name, tensor.detach().clone()) for name, tensor in model.named_parameters()]
    engine = AsyncEngine(Engine(model=tiny_model(), max_num_seqs=4, page_size=8, max_model_len=448))

    def fail_half_way(engine):
        with pytest.raises(ValueError, match="missing"):
            engine.update_weights(weights[:1], 1)

    async def scenario():
        async with held(engine, ("a", THREE), ("b", ONE)) as (several, one):
            await engine.run(Engine.release_kv_cache)
            await engine.run(fail_half_way)
            assert await engine.abort(["b", "a/1"]) == ["a/1", "b"]
            assert endings(await asyncio.wait_for(one, 60)) == {"b": ("abort", 0)}
            await engine.run(lambda engine: engine.update_weights(weights, 2))
            await engine.run(Engine.resume_kv_cache)
        return await several

    samples = asyncio.run(scenario())
    engine.close()
    assert endings(samples) == {"a/0": ("length", 9), "a/1": ("abort", 0), "a/2": ("length", 9)}
    assert {sample.weights_version for sample in samples if sample.token_ids} == {2}


def test_a_request_that_waits_for_the_end_of_its_namesake_is_ended_beside_it(engine):
    """While a pause waits for what runs; the sample of the second one that is left begins when the first is gone."""

    async def scenario():
        two = SamplingParams(max_tokens=400, n=2, ignore_eos=True)
        first = asyncio.create_task(engine.generate(PROMPT, two, "a"))
        while not await engine.run(lambda engine: engine.num_requests[0]):
            pass
        pausing = asyncio.create_task(engine.pause())
        await asyncio.sleep(0)
        second = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=9, n=2, ignore_eos=True), "a"))
        await holds(engine, 1)
        assert await engine.abort("a/1") == ["a/1", "a/1"]
        assert not pausing.done()
        assert await engine.abort("a/0") == ["a/0", "a/0"]
        await pausing
        samples = [*await first, *await asyncio.wait_for(second, 60)]
        await engine.resume()
        return samples

    assert [sample.finish_reason for sample in asyncio.run(scenario())] == ["abort"] * 4


def test_what_could_not_begin_says_so_when_it_is_aborted(engine):
    async def scenario():
        async with engine.paused():
            tasks = [asyncio.create_task(engine.generate([5000], params, "bad")) for params in (ONE, THREE)]
            tasks.append(asyncio.create_task(engine.generate(PROMPT, ONE, ["no name"])))
            await holds(engine, 3)
            assert await engine.abort(["bad", "bad/1"]) == []
            for task in tasks[:2]:
                with pytest.raises(ValueError, match="token id 5000 is outside the vocabulary"):
                    await asyncio.wait_for(task, 60)
        with pytest.raises(ValueError, match="must be a non-empty string"):
            await tasks[2]

    asyncio.run(scenario())


@pytest.mark.parametrize("aborted", [(), ("a/1",)], ids=["whole", "in part"])
def test_a_caller_that_leaves_gives_all_its_places_back_in_the_pause(engine, aborted):
    async def scenario():
        async with held(engine, ("a", THREE), ("b", THREE)) as (leaver, other):
            with pytest.raises(QueueFullError):
                await engine.generate(PROMPT, ONE)
            assert await engine.abort(aborted) == [*aborted]
            leaver.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaver
            await holds(engine, 1)
            assert engine.num_unfinished == 3
            assert await engine.abort("a") == []
            again = asyncio.create_task(engine.generate(PROMPT, ONE, "a"))
            await holds(engine, 2)
        return [*await again, *await other]

    names = ("a", "b/0", "b/1", "b/2")
    assert endings(asyncio.run(scenario())) == dict.fromkeys(names, ("length", 9))


def test_a_drain_ends_with_the_last_one_that_an_abort_takes_out_of_a_pause(engine):
    async def scenario():
        async with held(engine, ("a", THREE), ("b", ONE)) as tasks:
            draining = asyncio.create_task(engine.drain())
            assert await engine.abort(["a/0", "b"]) == ["a/0", "b"]
            assert not draining.done()
            assert await engine.abort("a") == ["a/1", "a/2"]
            await asyncio.wait_for(draining, 60)
            return [sample for task in tasks for sample in await task]

    assert {reason for reason, _ in endings(asyncio.run(scenario())).values()} == {"abort"}


def test_what_is_held_when_the_engine_closes_is_told(engine):
    async def scenario():
        await engine.pause()
        tasks = [
            asyncio.create_task(engine.generate(PROMPT, params, name)) for name, params in (("a", THREE), ("b", ONE))
        ]
        await holds(engine, 2)
        assert await engine.abort("a/2") == ["a/2"]
        await asyncio.to_thread(engine.close)
        for task in tasks:
            with pytest.raises(EngineClosedError, match="was closed"):
                await asyncio.wait_for(task, 60)

    asyncio.run(scenario())
