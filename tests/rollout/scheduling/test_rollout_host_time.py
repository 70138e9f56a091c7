"""The engine's own work per step, with the model's replaced by tokens that are there already."""

import time

import numpy as np
import torch
from replayed_graphs import install
from rollout_models import tiny_model

from vexact.rollout import Engine, SamplingParams

NUM_SEQS, NUM_TOKENS = 256, 120


def test_a_decode_step_of_256_sequences_costs_a_fraction_of_a_millisecond(monkeypatch):
    """CPU time of this thread, so that a busy machine counts little; about 0.15 ms when written, on two cores."""
    engine = Engine(model=tiny_model(), max_num_seqs=NUM_SEQS, max_model_len=256, async_scheduling=True)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 90, (3, NUM_SEQS), dtype=np.int32))
    install(engine, sizes=(NUM_SEQS,), num_keys=(256,), new_capture=lambda: lambda compute: lambda: tokens)
    monkeypatch.setattr(engine._runner, "_forward", lambda inputs: (None, None))
    monkeypatch.setattr(engine._runner, "_sampled", lambda inputs, *_: tokens[:, : inputs.num_sampled])
    params = SamplingParams(n=8, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [[token] * 20 for token in range(NUM_SEQS // 8)]
    engine.generate(prompts, params)  # numpy's and Python's first-call costs
    engine.stats()
    for prompt in prompts:
        engine.add_request(prompt, params)
    engine.step()
    started = time.thread_time()
    while engine.has_unfinished:
        engine.step()
    assert (time.thread_time() - started) / NUM_TOKENS < 0.6e-3
    assert engine.stats()["rollout/async_ratio"] > 0.9
