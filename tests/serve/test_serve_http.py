"""The official client against a server: what it gets, bit for bit, and the errors it raises."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

import numpy as np
import openai
import pytest
from processes import until
from serve_support import MAX_LEN, serving, tiny_engine

from vexact.rollout import Engine, SamplingParams
from vexact.serve.server import Server

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
IDS: dict[str, Any] = {"return_token_ids": True}


@pytest.fixture(scope="module")
def offline() -> Engine:
    return tiny_engine(max_num_seqs=3, page_size=8, seed=7)


def expected(offline: Engine, prompt: str | list[int], params: SamplingParams, name: str) -> list[Any]:
    ids = offline.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
    return offline.generate([ids], params, [name])


def same_bits(logprobs: list[float], sample: Any) -> bool:
    return np.array_equal(np.float32(logprobs), sample.logprobs)


def until_idle(server: Server) -> None:
    assert until(lambda: not server._service.engine.num_unfinished), "a request runs on without its client"


def test_a_completion_is_the_engines_sample(client: openai.OpenAI, offline: Engine) -> None:
    answer = client.completions.create(
        model="tiny", prompt="hello", max_tokens=20, n=2, logprobs=0, extra_body=IDS | {"request_id": "mine"}
    )
    samples = expected(offline, "hello", SamplingParams(max_tokens=20, n=2), "mine")
    for choice, sample in zip(answer.choices, samples, strict=True):
        assert choice.token_ids == list(sample.token_ids)
        assert choice.prompt_token_ids == list(sample.prompt_token_ids)
        assert (choice.text, choice.finish_reason) == (sample.text, sample.finish_reason)
        assert choice.logprobs is not None
        assert same_bits(choice.logprobs.token_logprobs, sample)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(sample.token_ids)
    assert answer.usage.completion_tokens == sum(len(sample.token_ids) for sample in samples)
    assert answer.usage.prompt_tokens == 5


def test_a_streamed_chat_adds_up_to_the_whole_one(client: openai.OpenAI, offline: Engine) -> None:
    asked: dict[str, Any] = {"model": "alias", "messages": CHAT, "max_completion_tokens": 40, "n": 3, "seed": 11}
    asked |= {"logprobs": True, "temperature": 0.9, "top_p": 0.95, "stop": ["a", "é"]}
    asked |= {"extra_body": IDS | {"top_k": 60, "min_p": 0.001, "ignore_eos": True, "stop_token_ids": [70]}}
    whole = client.chat.completions.create(**asked)
    texts, ids, logprobs, ends = ({i: default() for i in range(3)} for default in (str, list, list, str))
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None
        texts[choice.index] += choice.delta.content or ""
        ids[choice.index] += getattr(choice, "token_ids", [])
        logprobs[choice.index] += [one.logprob for one in choice.logprobs.content] if choice.logprobs else []
        ends[choice.index] += choice.finish_reason or ""
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    params = SamplingParams(
        n=3, max_tokens=40, seed=11, temperature=0.9, top_p=0.95, top_k=60, min_p=0.001, ignore_eos=True,
        stop=["a", "é"], stop_token_ids=[70],
    )  # fmt: skip
    samples = expected(offline, "<system>be brief\n<user>hi\n<assistant>", params, "0")
    for index, (choice, sample) in enumerate(zip(whole.choices, samples, strict=True)):
        assert choice.token_ids == ids[index] == list(sample.token_ids)
        assert choice.message.content == texts[index] == sample.text
        assert choice.finish_reason == ends[index] == sample.finish_reason
        assert same_bits(logprobs[index], sample)
        assert [one.logprob for one in choice.logprobs.content] == logprobs[index]
    assert whole.prompt_token_ids == list(samples[0].prompt_token_ids)
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids


def test_an_agent_never_tokenises_again(client: openai.OpenAI, offline: Engine) -> None:
    first = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=9, seed=1, extra_body=IDS)
    history = [*first.prompt_token_ids, *first.choices[0].token_ids, 9, 8]
    second = client.chat.completions.create(
        model="tiny",
        messages=openai.omit,
        max_tokens=9,
        extra_body=IDS | {"prompt_token_ids": history, "request_id": "b"},
    )
    third = client.completions.create(model="tiny", prompt=history, max_tokens=9, extra_body=IDS | {"request_id": "b"})
    (sample,) = expected(offline, history, SamplingParams(max_tokens=9), "b")
    assert second.choices[0].token_ids == third.choices[0].token_ids == list(sample.token_ids)
    assert second.prompt_token_ids == history


def test_a_prompt_has_the_log_probabilities_of_the_engine(client: openai.OpenAI, offline: Engine) -> None:
    own = {"prompt_logprobs": 0, "request_id": "p"}
    answer = client.completions.create(model="tiny", prompt="hé", max_tokens=2, extra_body=own)
    chat = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2, extra_body=own)
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    for told, prompt in (
        (answer.choices[0].prompt_logprobs, "hé"),
        (chat.prompt_logprobs, "<system>be brief\n<user>hi\n<assistant>"),
    ):
        (sample,) = expected(offline, prompt, params, "p")
        assert (told[0], len(told)) == (None, len(sample.prompt_token_ids))
        ids = [int(token_id) for one in told[1:] for token_id in one]
        assert ids == list(sample.prompt_token_ids[1:])
        given = [entry["logprob"] for one in told[1:] for entry in one.values()]
        assert np.float32(given).tobytes() == sample.prompt_logprobs.tobytes()
    with pytest.raises(openai.BadRequestError, match="leave out stream"):
        client.completions.create(model="tiny", prompt="x", stream=True, extra_body=own)


def test_a_batch_of_prompts_and_the_longest_answer(client: openai.OpenAI, offline: Engine) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["ab", "c"], max_tokens=6, n=2, extra_body=IDS | {"request_id": "r"}
    )
    params = SamplingParams(max_tokens=6, n=2)
    samples = expected(offline, "ab", params, "r-0") + expected(offline, "c", params, "r-1")
    assert [choice.token_ids for choice in answer.choices] == [list(sample.token_ids) for sample in samples]
    chat = client.chat.completions.create(model="tiny", messages=CHAT, seed=0, extra_body=IDS | {"ignore_eos": True})
    assert len(chat.prompt_token_ids) + chat.usage.completion_tokens == MAX_LEN
    on = IDS | {"ignore_eos": True}
    drawn = [client.completions.create(model="tiny", prompt="x", extra_body=on).choices[0].token_ids for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert len(drawn[0]) == 16, "OpenAI's default"


def test_the_same_requests_give_the_same_tokens_at_any_concurrency(server: Server, offline: Engine) -> None:
    asks = [(f"prompt {i % 5}", SamplingParams(max_tokens=4 + i % 13, temperature=(i % 3) / 2)) for i in range(30)]
    direct = offline.generate(
        [offline.tokenizer(text)["input_ids"] for text, _ in asks],
        [params for _, params in asks],
        [f"c{i}" for i in range(len(asks))],
    )

    async def ask(client: openai.AsyncOpenAI, limit: asyncio.Semaphore, i: int) -> tuple[list[int], list[float]]:
        (text, params), ids, logprobs = asks[i], [], []
        own = IDS | {"request_id": f"c{i}"}
        async with limit:
            answer = await client.completions.create(
                model="tiny",
                prompt=text,
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                logprobs=0,
                stream=bool(i % 2),
                extra_body=own,
            )
            if i % 2:
                async for chunk in answer:
                    ids += chunk.choices[0].token_ids
                    logprobs += chunk.choices[0].logprobs.token_logprobs if chunk.choices[0].logprobs else []
                return ids, logprobs
            return answer.choices[0].token_ids, answer.choices[0].logprobs.token_logprobs

    async def everyone(concurrency: int) -> list[tuple[list[int], list[float]]]:
        limit = asyncio.Semaphore(concurrency)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, limit, i) for i in range(len(asks))))

    for concurrency in (3, 30):
        for (ids, logprobs), sample in zip(asyncio.run(everyone(concurrency)), direct, strict=True):
            assert ids == list(sample.token_ids)
            assert same_bits(logprobs, sample)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_takes_its_request_along(client: openai.OpenAI, server: Server, streamed: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 500, "n": 8}
    asked["extra_body"] = {"ignore_eos": True}
    if streamed:
        stream = client.completions.create(**asked, stream=True)
        assert next(iter(stream)).choices
        assert server._service.engine.num_unfinished > 0
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**asked, timeout=0.05)
    until_idle(server)
    assert client.completions.create(model="tiny", prompt="x").choices[0].finish_reason in ("stop", "length")


def test_parameters_that_do_nothing_are_taken(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=2,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={"5": 0},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        top_logprobs=0,
        user="me",
        store=False,
        stop=None,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        extra_body={
            **{"ignore_eos": True, "spaces_between_special_tokens": True, "include_reasoning": True},
            **{"return_tokens_as_token_ids": False, "add_special_tokens": False, "documents": [], "vllm_xargs": {}},
        },
    )
    assert [chunk.usage.completion_tokens for chunk in answer if chunk.usage] == [2]
    also = {"add_special_tokens": True, "logits_processors": [], "kv_transfer_params": {}, "ignore_eos": True}
    assert client.completions.create(model="tiny", prompt="x", extra_body=also).usage.completion_tokens == 16


def test_a_stop_reason_is_what_the_request_asked_for(client: openai.OpenAI) -> None:
    """As vLLM has it: an end-of-sequence token is nobody's wish."""
    free = client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body=IDS | {"ignore_eos": True})
    (token,) = free.choices[0].token_ids
    asked = {"request_id": free.id, "stop_token_ids": [token]}
    stopped = client.completions.create(model="tiny", prompt="x", max_tokens=5, extra_body=asked).choices[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    many = client.completions.create(model="tiny", prompt="x", max_tokens=400, n=20, temperature=5, seed=1).choices
    ended = [choice for choice in many if choice.finish_reason == "stop"]
    assert ended
    assert all(choice.stop_reason is None for choice in ended)


def test_models_health_and_metrics(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == MAX_LEN
    assert json.load(urllib.request.urlopen(f"{server.url}/health")) == {"status": "ok"}

    def metrics() -> dict[str, float]:
        text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = metrics()
    client.completions.create(model="tiny", prompt="abc", max_tokens=5, n=2, extra_body={"ignore_eos": True})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="")
    grown = {name: value - before.get(name, 0) for name, value in metrics().items()}
    label = '{model_name="tiny"}'
    assert grown[f"vexact:generation_tokens_total{label}"] == 10
    assert grown[f"vexact:prompt_tokens_total{label}"] == 3
    assert grown['vexact:request_success_total{finished_reason="length",model_name="tiny"}'] == 2
    assert grown['vexact:request_failure_total{model_name="tiny",status="400"}'] == 1
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds"):
        assert grown[f"vexact:{name}_count{label}"] == 2
    assert metrics()[f"vexact:num_requests_running{label}"] == 0


def test_a_small_cache_limits_what_a_request_may_be() -> None:
    with serving(tiny_engine(num_pages=2, page_size=8)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        assert client.models.list().data[0].max_model_len == 17
        answer = client.chat.completions.create(
            model="tiny", messages=openai.omit, extra_body={"prompt_token_ids": [7], "ignore_eos": True}
        )
    assert answer.usage.total_tokens == 17
