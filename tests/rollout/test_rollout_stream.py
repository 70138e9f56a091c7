"""An engine behind an event loop: tokens as they come, and who may begin, wait, pause and leave."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
from processes import until
from rollout_models import tiny_model

from vexact.rollout import Engine, SamplingParams
from vexact.rollout.async_engine import AsyncEngine
from vexact.rollout.scheduling.block_manager import KVIntegrityError
from vexact.rollout.stream import Ask, EngineClosedError, EngineFailedError, QueueFullError

SHORT = SamplingParams(max_tokens=9, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
PROMPT = [5, 6, 7]


def make(**config):
    return Engine(model=tiny_model(), max_num_seqs=4, page_size=8, max_model_len=448, **config)


@pytest.fixture(params=[False, True], ids=["step by step", "ahead"])
def engine(request):
    driven = AsyncEngine(make(async_scheduling=request.param), max_queue=2)
    yield driven
    driven.close()
    assert driven.num_unfinished == 0
    assert not any((driven._parts, driven._held, driven._live, driven._unstarted, driven._outbox))


async def collect(engine, prompt, params, name=None, **options):
    """Tokens and log-probabilities by sample, the ended samples, and how many deltas there were."""
    tokens, logprobs, samples, count = {}, {}, {}, 0
    async with engine.stream(prompt, params, name, **options) as deltas:
        async for delta in deltas:
            count += 1
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
            logprobs.setdefault(delta.index, []).extend(delta.logprobs)
            if delta.sample is not None:
                samples[delta.index] = delta.sample
        assert deltas.asked_at <= deltas.first_token_at <= time.monotonic()
    return tokens, logprobs, samples, count


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("num_pages", [None, 12], ids=["roomy", "preempting"])
def test_a_stream_is_the_samples_of_a_direct_call(live, num_pages):
    params = SamplingParams(max_tokens=30, n=3, ignore_eos=True)
    engine = AsyncEngine(make(num_pages=num_pages))

    async def both():
        return await asyncio.gather(
            collect(engine, PROMPT, params, "a", live=live), collect(engine, [9] * 20, params, "b", live=live)
        )

    streams = asyncio.run(both())
    engine.close()
    direct = make().generate([PROMPT, [9] * 20], params, ["a", "b"])
    for (tokens, logprobs, samples, count), expected in zip(streams, (direct[:3], direct[3:])):
        assert (count > 3) == live
        for index, sample in enumerate(expected):
            assert tuple(tokens[index]) == samples[index].token_ids == sample.token_ids
            assert np.array_equal(np.float32(logprobs[index]), sample.logprobs)


def test_tokens_depend_on_the_draw_id_where_one_is_given(engine):
    async def scenario():
        twins = [engine.generate(PROMPT, SHORT, f"unique{i}", draw_id="same") for i in range(2)]
        return [samples[0] for samples in await asyncio.gather(*twins)]

    first, second = asyncio.run(scenario())
    assert first.token_ids == second.token_ids == make().generate([PROMPT], SHORT, ["same"])[0].token_ids
    assert (first.request_id, second.request_id) == ("unique0", "unique1")


def test_several_requests_start_together_or_not_at_all(engine):
    two, one = SamplingParams(max_tokens=9, n=2, ignore_eos=True), SHORT

    async def scenario():
        found = {}
        async with engine.stream_all([Ask(PROMPT, two, "a"), Ask([1], one, "b")]) as deltas:
            async for delta in deltas:
                if delta.sample is not None:
                    found[delta.index] = (delta.sample.request_id, delta.sample.token_ids)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            async with engine.stream_all([Ask(PROMPT, LONG, "c"), Ask([5000], one, "d")]):
                pass
        await engine.run(Engine.check_idle)
        return found

    direct = make().generate([PROMPT, [1]], [two, one], ["a", "b"])
    assert asyncio.run(scenario()) == {i: (sample.request_id, sample.token_ids) for i, sample in enumerate(direct)}


def test_who_leaves_a_stream_takes_all_its_samples_along(engine):
    async def scenario():
        async with engine.stream(PROMPT, SamplingParams(max_tokens=400, n=3, ignore_eos=True)) as deltas:
            async for _ in deltas:
                break
        await engine.run(Engine.check_idle)

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", [0, 1, 2, 5])
def test_a_caller_cancelled_at_any_moment_leaves_nothing(engine, moment):
    async def scenario():
        busy = asyncio.create_task(engine.generate([1, 2], LONG, "busy"))
        task = asyncio.create_task(engine.generate(PROMPT, LONG, "gone"))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await engine.run(lambda _: engine.num_unfinished) <= 1
        await engine.abort()
        await busy
        await engine.run(Engine.check_idle)

    asyncio.run(scenario())


def test_all_samples_of_one_request_are_aborted_by_its_id(engine):
    async def scenario():
        task = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=400, n=2, ignore_eos=True), "two"))
        while await engine.run(lambda e: e.num_requests) != (2, 0):
            await asyncio.sleep(0)
        assert await engine.abort({"two"}) == ["two/0", "two/1"]
        assert [sample.finish_reason for sample in await task] == ["abort", "abort"]

    asyncio.run(scenario())


def test_the_queue_is_bounded_and_what_is_refused_costs_nothing(engine):
    async def scenario():
        running = [asyncio.create_task(engine.generate(PROMPT, LONG, f"r{i}")) for i in range(6)]
        await asyncio.sleep(0)
        assert engine.is_full
        with pytest.raises(QueueFullError, match=r"6 samples are unfinished and 1 more were asked for; .* at most 6"):
            await engine.generate(PROMPT, SHORT)
        with pytest.raises(ValueError, match="7 samples at once are more than the 6"):
            await engine.generate(PROMPT, SamplingParams(n=7))
        await engine.abort({"r0"})
        assert len(await engine.generate(PROMPT, SHORT)) == 1
        await engine.abort()
        await asyncio.gather(*running)

    asyncio.run(scenario())
    with pytest.raises(ValueError, match="max_queue=-1"):
        AsyncEngine(make(), max_queue=-1)


@pytest.mark.parametrize("abort", [True, False])
def test_a_pause_waits_for_what_runs_and_holds_what_comes(engine, abort):
    weights = [(name, tensor.detach().clone()) for name, tensor in tiny_model(seed=1).named_parameters()]

    async def scenario():
        old = asyncio.create_task(engine.generate(PROMPT, LONG, "old"))
        await engine.generate([1], SamplingParams(max_tokens=3, ignore_eos=True))
        async with engine.paused(abort=abort):
            assert ((await old)[0].finish_reason == "abort") == abort
            new = [asyncio.create_task(engine.generate(PROMPT, SHORT, name)) for name in ("new", "cancelled", "named")]
            await asyncio.sleep(0.02)
            with pytest.raises(RuntimeError, match="paused already"):
                await engine.pause()
            new[1].cancel()
            assert await engine.abort() == []
            assert await engine.abort({"named"}) == ["named"]
            assert (await new[2])[0].token_ids == ()
            await engine.run(lambda engine: engine.update_weights(weights, 1))
            assert not new[0].done()
        return (await new[0])[0]

    sample = asyncio.run(scenario())
    direct = Engine(model=tiny_model(seed=1)).generate([PROMPT], SHORT, ["new"])[0]
    assert (sample.weights_version, sample.token_ids) == (1, direct.token_ids)


def test_a_pause_that_is_cancelled_is_none(engine):
    async def scenario():
        old = asyncio.create_task(engine.generate(PROMPT, LONG, "old"))
        await asyncio.sleep(0)
        pausing = asyncio.create_task(engine.pause())
        await asyncio.sleep(0)
        may_step = threading.Event()
        held = engine.submit(lambda _: may_step.wait())  # right behind the pause: what it waits for cannot end
        while engine._pause is None:
            await asyncio.sleep(0.001)
        pausing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pausing
        may_step.set()
        await asyncio.wrap_future(held)
        assert len(await engine.generate(PROMPT, SHORT)) == 1
        await engine.abort()
        await old

    asyncio.run(scenario())


def test_a_drain_ends_what_runs_and_takes_no_more(engine):
    async def scenario():
        old = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True), "old"))
        await asyncio.sleep(0)
        drained = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(EngineClosedError, match="drains"):
                await engine.generate(PROMPT, SHORT)
        await drained
        assert len((await old)[0].token_ids) == 60
        await engine.run(Engine.check_idle)

    asyncio.run(scenario())


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(engine):
    def starve(engine):
        execute = engine._runner.execute

        def once(inputs):
            engine._runner.execute = execute
            raise torch.OutOfMemoryError("no memory")

        engine._runner.execute = once

    async def scenario():
        await engine.run(starve)
        with pytest.raises(torch.OutOfMemoryError):
            await engine.generate(PROMPT, SHORT, "starved")
        return (await engine.generate(PROMPT, SHORT, "fed"))[0]

    assert asyncio.run(scenario()).token_ids == make().generate([PROMPT], SHORT, ["fed"])[0].token_ids


def test_a_failed_engine_tells_everyone():
    driven = AsyncEngine(make())

    def lose(engine):
        engine._blocks.allocate()  # a page that no request holds

    async def scenario():
        await driven.run(lose)
        running = [asyncio.create_task(driven.generate(PROMPT, SHORT, name)) for name in "ab"]
        for error in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(error, KVIntegrityError | EngineFailedError) or len(error) == 1
        for _ in range(2):
            with pytest.raises(EngineFailedError, match=r"has failed.*still referenced"):
                await driven.generate(PROMPT, SHORT)
        with pytest.raises(EngineFailedError):
            await driven.run(Engine.check_idle)

    asyncio.run(scenario())
    assert isinstance(driven.refusal, EngineFailedError)
    driven.close()


def test_requests_of_a_loop_that_is_gone_do_not_run_on(engine):
    async def leave():
        stream = engine.stream(PROMPT, LONG)
        await stream.__aenter__()
        return stream

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert until(lambda: not engine.num_unfinished)
    asyncio.run(engine.run(Engine.check_idle))


def test_callers_on_several_loops_share_the_engine(engine):
    found = {}

    def work(name):
        found[name] = asyncio.run(collect(engine, PROMPT, SHORT, name))[0][0]

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    direct = make().generate([PROMPT] * 3, SHORT, list("xyz"))
    assert [tuple(found[name]) for name in "xyz"] == [sample.token_ids for sample in direct]
