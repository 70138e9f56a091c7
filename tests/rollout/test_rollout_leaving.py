"""Who is ended by which id, and what is said to those who come back too late."""

import asyncio

import pytest
from rollout_models import tiny_model

from vexact.rollout import Engine, SamplingParams
from vexact.rollout.async_engine import AsyncEngine
from vexact.rollout.stream import EngineClosedError

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
TWO = SamplingParams(max_tokens=400, n=2, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    return Engine(model=model, max_num_seqs=4, page_size=8, max_model_len=448)


@pytest.fixture
def driven(engine):
    running = AsyncEngine(engine)
    yield running
    running.close()


# asked for, and what ends of the requests "a" (two samples), "a/0/1", "b", "10", "1" and "0"
ABORTS = [
    ("a", {"a/0", "a/1"}),
    ({"a/1"}, {"a/1"}),
    ("10", {"10"}),
    (["b", "10"], {"b", "10"}),
    (iter(["1", "0"]), {"1", "0"}),
    ("a/0", {"a/0"}),
    ("a/", set()),
    ((), set()),
    (None, {"a/0", "a/1", "a/0/1", "b", "10", "1", "0"}),
]


@pytest.mark.parametrize(("ids", "ended"), ABORTS, ids=[f"{number}" for number in range(len(ABORTS))])
def test_an_id_ends_its_request_and_no_other(engine, ids, ended):
    """A text is one id, not its letters; a request whose name begins like another's is none of its samples."""
    given = list(ids) if ids is not None and not isinstance(ids, str) else ids
    engine.add_request(PROMPT, TWO, "a")
    for name in ("a/0/1", "b", "10", "1", "0"):
        engine.add_request(PROMPT, LONG, name)
    engine.step()
    samples = engine.abort(given if given is None or isinstance(given, str) else iter(given))
    assert {sample.request_id for sample in samples} == ended
    engine.abort_all()
    engine.check_idle()

    async def scenario(running):
        tasks = [asyncio.create_task(running.generate(PROMPT, TWO, "a"))]
        tasks += [asyncio.create_task(running.generate(PROMPT, LONG, name)) for name in ("a/0/1", "b", "10", "1", "0")]
        while await running.run(lambda engine: sum(engine.num_requests)) < 7:
            pass
        found = await running.abort(given if given is None or isinstance(given, str) else iter(given))
        await running.abort()
        await asyncio.gather(*tasks)
        return set(found)

    running = AsyncEngine(engine)
    try:
        assert asyncio.run(scenario(running)) == ended
    finally:
        running.close()


def test_who_reads_a_stream_that_was_left_is_told(driven):
    async def rest(stream):
        return [delta async for delta in stream]

    async def scenario():
        async with driven.stream(PROMPT, LONG) as left:
            pass
        with pytest.raises(RuntimeError, match="read inside the block that opened it"):
            await asyncio.wait_for(rest(left), 60)
        block = driven.stream(PROMPT, LONG)
        reader = asyncio.create_task(rest(await block.__aenter__()))
        await driven.generate(PROMPT, SHORT)
        await block.__aexit__(None, None, None)
        with pytest.raises(RuntimeError, match="read inside the block"):
            await asyncio.wait_for(reader, 60)
        async with driven.stream(PROMPT, SHORT) as whole:
            assert sum(len(delta.token_ids) for delta in await rest(whole)) == 4
        assert await rest(whole) == []  # it had ended

    asyncio.run(scenario())


def test_a_call_may_close_the_engine(driven):
    async def scenario():
        waiting = asyncio.create_task(driven.generate(PROMPT, LONG))
        await driven.run(lambda _: driven.close())
        with pytest.raises(EngineClosedError):
            await asyncio.wait_for(waiting, 60)
        with pytest.raises(EngineClosedError, match="is closed"):
            await driven.generate(PROMPT, SHORT)

    asyncio.run(scenario())


def test_every_sample_has_a_first_token_of_its_own(model):
    """One that waited for a slot did not begin with the others."""
    running = AsyncEngine(Engine(model=model, max_num_seqs=1, page_size=8, max_model_len=448))

    async def scenario():
        ends, first = {}, {}
        params = SamplingParams(max_tokens=5, n=3, ignore_eos=True)
        async with running.stream(PROMPT, params, live=False) as stream:
            async for delta in stream:
                ends[delta.index] = len(ends)
            first = stream.first_tokens_at
            assert stream.first_token_at == first[0]
        assert sorted(first) == [0, 1, 2]
        assert first[0] < first[1] < first[2]

    asyncio.run(scenario())
    running.close()
