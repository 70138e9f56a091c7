"""The log-probabilities of a prompt's own tokens are the training forward's, whatever else the engine does."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from rollout_models import VOCAB, tiny_config, tiny_model

from vexact.models import random_model, save_hf
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.async_engine import AsyncEngine
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8], [3, 1], [2]]


def trained(model, prompts):
    """What the trainer computes for prompts as responses to their first tokens, packed together."""
    longer = [prompt for prompt in prompts if len(prompt) > 1]
    with torch.no_grad():
        scores = token_scores(model, pack_tokens([TokenSequence(prompt[:1], prompt[1:]) for prompt in longer]))
    values = iter(np.split(scores.logprobs.numpy(), np.cumsum([len(prompt) - 1 for prompt in longer])))
    return [next(values) if len(prompt) > 1 else np.empty(0, np.float32) for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [{}, {"page_size": 3, "max_num_seqs": 2, "num_pages": 14, "max_num_batched_tokens": 9}]
)
def test_they_are_those_of_the_training_forward(config, dtype):
    model = random_model(tiny_config(), seed=0, dtype=dtype)
    engine = Engine(model=model, eos_token_ids=(), **config)
    asks = SamplingParams(n=2, max_tokens=20, temperature=0.3, top_k=3, prompt_logprobs=0)
    plain = SamplingParams(n=2, max_tokens=20, temperature=0.3, top_k=3)
    samples, unasked = engine.generate(PROMPTS, asks, list("abcd")), engine.generate(PROMPTS, plain, list("abcd"))
    expected = [values for values in trained(model, PROMPTS) for _ in range(2)]
    for sample, other, values in zip(samples, unasked, expected, strict=True):
        assert sample.prompt_logprobs.dtype == np.float32
        assert sample.prompt_logprobs.tobytes() == values.tobytes()
        assert (sample.token_ids, other.prompt_logprobs) == (other.token_ids, None)
        assert sample.logprobs.tobytes() == other.logprobs.tobytes()


def test_experts_and_callers_on_a_loop():
    model = tiny_model(
        architectures=["Qwen3MoeForCausalLM"], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip

    async def ask():
        engine = AsyncEngine(Engine(model=model, eos_token_ids=()))
        params = SamplingParams(max_tokens=4, prompt_logprobs=0)
        found = await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS))
        engine.close()
        return [sample.prompt_logprobs.tobytes() for (sample,) in found]

    assert asyncio.run(ask()) == [values.tobytes() for values in trained(model, PROMPTS)]


def test_new_weights_give_new_ones_and_an_aborted_request_none():
    model, other = tiny_model(), tiny_model(seed=1)
    engine = Engine(model=model, eos_token_ids=())
    params = SamplingParams(max_tokens=4, prompt_logprobs=0)
    engine.add_request(PROMPTS[0], params, "a")
    assert engine.abort()[0].prompt_logprobs is None
    engine.update_weights(other.named_parameters(), version=1)
    (sample,) = engine.generate(PROMPTS[:1], params)
    assert sample.prompt_logprobs.tobytes() == trained(other, PROMPTS[:1])[0].tobytes()


@pytest.mark.parametrize("value", [1, -1, True, False, 0.0, "0", [0], np.int64(1)])
def test_there_are_no_alternatives(value):
    with pytest.raises(ValueError, match=r"prompt_logprobs=.* must be None or 0.* no alternatives"):
        SamplingParams(prompt_logprobs=value)


def test_what_cannot_be_computed_is_refused_before_it_starts(tmp_path):
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    engine = Engine(model=tiny_model(), eos_token_ids=(), max_num_batched_tokens=8)
    with pytest.raises(ValueError, match="9 prompt tokens in one pass, more than max_num_batched_tokens=8"):
        engine.generate([[VOCAB - 1] * 9], params)
    stock = Engine(model=tiny_model(ops="stock"), eos_token_ids=(), batch_invariant=False)
    with pytest.raises(ValueError, match="prompt_logprobs needs an engine with batch_invariant=True"):
        stock.generate(PROMPTS, params)
    save_hf(engine.model.named_parameters(), engine.model.config, tmp_path)
    off = Engine(tmp_path, eos_token_ids=(), mismatch_mode="bf16_logits")
    with pytest.raises(ValueError, match="mismatch_mode=bf16_logits has this engine compute others"):
        off.generate(PROMPTS, params)
    assert not any(one.has_unfinished for one in (engine, stock, off))
