"""Engines whose steps cost next to nothing, and requests that end in every way."""

from __future__ import annotations

import random

from hash_model import HashModel
from rollout_models import VOCAB, LetterTokenizer, bits, tiny_model

from vexact.rollout import Engine, SamplingParams

MAX_LEN = 96
EOS = (3, 44, 71)
SYNC, AHEAD = {"async_scheduling": False}, {"async_scheduling": True}


def make(seed=0, **config):
    defaults = {"max_model_len": MAX_LEN, "tokenizer": LetterTokenizer(), "eos_token_ids": EOS, "seed": 11}
    engine = Engine(model=tiny_model(seed), **(defaults | config))
    HashModel(engine)
    return engine


def fingerprint(sample):
    numbers = bits(sample.logprobs), bits(sample.min_logits)
    return (sample.token_ids, *numbers, sample.finish_reason, sample.stop_reason, sample.text)


def workload():
    """Shared prefixes, every way of ending, and lengths from one token to many pages."""
    rng = random.Random(5)
    shared = [rng.randrange(VOCAB - 1) for _ in range(40)]
    requests = {}
    for index in range(40):
        prompt = shared[: rng.choice([0, 0, 7, 16, 33])] + [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 9))]
        requests[f"r{index}"] = (
            prompt,
            SamplingParams(
                n=rng.choice([1, 1, 3]),
                max_tokens=rng.choice([1, 2, 9, 17, 40, 40]),
                temperature=rng.choice([0.0, 0.7, 1.0]),
                top_k=rng.choice([-1, 5]),
                stop=rng.choice([None, None, ["ab", "q", "xyz"], "e"]),
                stop_token_ids=rng.choice([None, [5, 6]]),
                ignore_eos=rng.random() < 0.3,
            ),
        )
    return requests


def serve(engine, requests, names, rng, abort_share=0.0):
    """Requests that come while others run, some of which are aborted on the way; all samples."""
    waiting, samples = list(names), []
    seen = {}

    def see(request_ids, output):
        for request_id, token in zip(request_ids, output.token_ids.tolist(), strict=True):
            seen.setdefault(request_id, []).append(token)

    engine.observe_tokens(see)
    while waiting or engine.has_unfinished:
        if waiting and rng.random() < 0.5:
            engine.add_request(*requests[waiting[-1]], waiting.pop())
        running = [request.request_id for request in engine._scheduler.unfinished]
        if running and rng.random() < abort_share:
            samples += engine.abort({rng.choice(running)})
        samples += engine.step()
    engine.check_idle()
    for sample in samples:
        assert seen.get(sample.request_id, []) == list(sample.token_ids)
    return samples
