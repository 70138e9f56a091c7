"""The engine's own work per step, with the model's replaced by random tokens."""

import time

import numpy as np
from rollout_models import tiny_model

from vexact.rollout import Engine, SamplingParams
from vexact.rollout.sampling.sampler import StepOutput

NUM_SEQS, NUM_TOKENS = 64, 150


def test_a_decode_step_of_64_sequences_costs_less_than_a_millisecond(monkeypatch):
    """CPU time of this thread, so that a busy machine does not count; about 0.2 ms when written."""
    engine = Engine(model=tiny_model(), max_num_seqs=NUM_SEQS, max_model_len=256)
    rng = np.random.default_rng(0)

    def execute(inputs):
        count = inputs.num_sampled
        zeros = np.zeros(count, np.float32)
        return StepOutput(rng.integers(0, 90, count), zeros, zeros) if count else None

    monkeypatch.setattr(engine._runner, "execute", execute)
    params = SamplingParams(n=8, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [[token] * 20 for token in range(NUM_SEQS // 8)]
    engine.generate(prompts, params)  # numpy's and Python's first-call costs
    started = time.thread_time()
    engine.generate(prompts, params)
    assert (time.thread_time() - started) / NUM_TOKENS < 1e-3
