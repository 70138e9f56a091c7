"""An engine behind an event loop: the samples of an engine called directly, whatever comes when."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from rollout_models import tiny_model

from vexact.rollout import Engine, NonFiniteLogprobError, SamplingParams
from vexact.rollout.async_engine import AsyncEngine
from vexact.rollout.stream import EngineClosedError

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8] * 20, [1, 2], [3] * 9]


def make(**config):
    return Engine(model=tiny_model(), max_num_seqs=4, page_size=8, max_model_len=448, **config)


@pytest.fixture(params=[False, True], ids=["step by step", "ahead"])
def engine(request):
    driven = AsyncEngine(make(async_scheduling=request.param))
    yield driven
    driven.close()


def same(a, b):
    assert (a.request_id, a.token_ids, a.finish_reason) == (b.request_id, b.token_ids, b.finish_reason)
    assert np.array_equal(a.logprobs.view(np.int32), b.logprobs.view(np.int32))


def test_callers_that_come_one_by_one_get_the_samples_of_one_batch(engine):
    async def late(index):
        await asyncio.sleep(0.002 * index)
        return await engine.generate(PROMPTS[index], PARAMS, f"r{index}")

    async def everyone():
        return await asyncio.gather(*(late(index) for index in range(4)))

    samples = [sample for samples in asyncio.run(everyone()) for sample in samples]
    for ours, direct in zip(
        samples, make().generate(PROMPTS, PARAMS, [f"r{index}" for index in range(4)]), strict=True
    ):
        same(ours, direct)


def test_n_samples_of_one_prompt_come_together(engine):
    params = SamplingParams(max_tokens=5, n=3, ignore_eos=True)
    samples = asyncio.run(engine.generate(PROMPTS[0], params, "many"))
    for ours, direct in zip(samples, make().generate(PROMPTS[:1], params, ["many"]), strict=True):
        same(ours, direct)


def test_an_aborted_request_returns_what_it_has_and_a_new_one_goes_on_from_there(engine):
    async def scenario():
        first = asyncio.create_task(engine.generate(PROMPTS[0], LONG, "first"))
        other = asyncio.create_task(engine.generate(PROMPTS[1], PARAMS, "other"))
        await other
        assert await engine.abort({"first", "unknown"}) == ["first"]
        return (await first)[0]

    part = asyncio.run(scenario())
    whole = make().generate(PROMPTS[:1], LONG, ["first"])[0]
    count = len(part.token_ids)
    assert part.finish_reason == "abort"
    assert 0 < count < 400
    assert part.token_ids == whole.token_ids[:count]
    assert np.array_equal(part.logprobs, whole.logprobs[:count])
    asyncio.run(engine.run(Engine.check_idle))


def test_whoever_waits_for_what_a_call_took_out_of_the_engine_is_told(engine):
    """Not left waiting for ever; what the call leaves in goes on."""

    async def scenario():
        first, second = (asyncio.create_task(engine.generate(PROMPTS[0], LONG, name)) for name in ("a", "b"))
        while sum(await engine.run(lambda engine: engine.num_requests)) < 2:
            pass
        assert len(await engine.run(lambda engine: engine.abort({"a"}))) == 1
        with pytest.raises(RuntimeError, match="request 'a' was taken out of the engine by a call; use AsyncEngine"):
            await asyncio.wait_for(first, 30)
        assert await engine.run(Engine.abort_all) == ["b"]
        with pytest.raises(RuntimeError, match="request 'b' was taken out"):
            await asyncio.wait_for(second, 30)

    asyncio.run(scenario())
    assert engine.num_unfinished == 0


def test_a_cancelled_caller_leaves_nothing_behind(engine):
    async def scenario():
        task = asyncio.create_task(engine.generate(PROMPTS[0], LONG, "gone"))
        await engine.generate(PROMPTS[1], PARAMS, "other")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await engine.run(lambda engine: engine.has_unfinished)
        return await engine.generate(PROMPTS[0], PARAMS, "gone")

    same(asyncio.run(scenario())[0], make().generate(PROMPTS[:1], PARAMS, ["gone"])[0])


def test_errors_reach_their_caller_and_nobody_else(engine):
    async def refused():
        good = asyncio.create_task(engine.generate(PROMPTS[0], PARAMS, "good"))
        with pytest.raises(ValueError, match="exceed max_model_len"):
            await engine.generate([1] * 440, PARAMS, "long")
        with pytest.raises(ValueError, match="'good' is already running"):
            await engine.generate([1], PARAMS, "good")
        return (await good)[0]

    same(asyncio.run(refused()), make().generate(PROMPTS[:1], PARAMS, ["good"])[0])

    def poison(engine):
        with torch.no_grad():
            engine.model.norm.weight[0] = torch.nan

    async def poisoned():
        await engine.run(poison)
        with pytest.raises(NonFiniteLogprobError, match=r"request bad, response position 0.*norm\.weight"):
            await engine.generate(PROMPTS[0], PARAMS, "bad")

    asyncio.run(poisoned())


def test_weights_change_between_requests_only(engine):
    weights = [(name, tensor.detach().clone()) for name, tensor in tiny_model(seed=1).named_parameters()]

    async def scenario():
        running = asyncio.create_task(engine.generate(PROMPTS[0], LONG, "old"))
        await engine.generate(PROMPTS[1], PARAMS, "other")
        with pytest.raises(RuntimeError, match="unfinished requests"):
            await engine.run(lambda engine: engine.update_weights(weights, 1))
        await engine.abort()
        assert (await running)[0].weights_version == 0
        await engine.run(lambda engine: engine.update_weights(weights, 1))
        return (await engine.generate(PROMPTS[0], PARAMS, "new"))[0]

    assert asyncio.run(scenario()).weights_version == 1


def test_a_closed_engine_says_so():
    engine = AsyncEngine(make())

    async def scenario():
        waiting = asyncio.create_task(engine.generate(PROMPTS[0], LONG, "waiting"))
        await engine.generate(PROMPTS[1], PARAMS, "other")
        await asyncio.get_running_loop().run_in_executor(None, engine.close)
        with pytest.raises(RuntimeError, match="was closed"):
            await waiting
        with pytest.raises(RuntimeError, match="is closed"):
            await engine.generate(PROMPTS[0], PARAMS)

    asyncio.run(scenario())


def test_whoever_asked_while_the_thread_was_busy_is_told_of_the_close():
    engine = AsyncEngine(make())
    is_busy, may_go_on = threading.Event(), threading.Event()

    def hold(_):
        is_busy.set()
        may_go_on.wait()

    async def scenario():
        holding = engine.submit(hold)
        await asyncio.to_thread(is_busy.wait)
        request = asyncio.create_task(engine.generate(PROMPTS[0], PARAMS, "late"))
        waits = [request, *(asyncio.create_task(call) for call in (engine.run(lambda _: 1), engine.drain()))]
        await asyncio.sleep(0)  # all have asked
        engine._closed = True  # as close() begins
        may_go_on.set()
        await asyncio.to_thread(engine.close)
        return holding.result(), await asyncio.gather(*waits, return_exceptions=True)

    held, refused = asyncio.run(asyncio.wait_for(scenario(), timeout=60))
    assert held is None
    assert [type(error) for error in refused] == [EngineClosedError] * 3
