"""A draw is a function of logits, settings, seed and position: whoever draws otherwise is found out."""

import dataclasses

import numpy as np
import pytest
import torch

from vexact.audit import Audit, DrawError
from vexact.models import ModelConfig, random_model
from vexact.ops import sampling
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.requests.request import draw_settings
from vexact.rollout.sampling import sampler as sampler_module
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.types import TrainSequence

CONFIG = ModelConfig.from_hf_dict(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
)
PARAMS = SamplingParams(n=3, max_tokens=12, temperature=0.9, top_k=20, top_p=0.95, ignore_eos=True)
SEED = 5

pytestmark = pytest.mark.usefixtures("one_thread")


def generate(params=PARAMS):
    engine = Engine(model=random_model(CONFIG, seed=1), seed=SEED, max_num_seqs=4, page_size=8)
    return engine.generate([[3, 1, 4], [1, 5, 9, 2, 6], [5]], params, ["a", "b", "c"])


def audited(samples, asked=PARAMS, ratio=1.0, exactness="strict", every_token=False, **config):
    """One update under the audit; ``asked`` is what the trainer believes it asked for."""
    actor = Actor(random_model(CONFIG, seed=1), ActorConfig(optim=OptimConfig(lr=1e-2), **config))
    audit = Audit(exactness, ratio)
    audit.begin(samples, [draw_settings(asked, SEED, sample.request_id) for sample in samples])
    sequences = [TrainSequence(s, np.ones(len(s.token_ids), np.float32)) for s in samples]
    actor.update(sequences, audit.check, redraw=audit.redraw, every_token=every_token)
    return audit


def with_sampler(monkeypatch, change):
    """The engine's sampler with its parameters or its result changed; log-probabilities stay true."""
    monkeypatch.setattr(sampler_module, "sample", lambda logits, params: change(logits, params, sampling.sample))


def argmax(logits, params, sample):
    best = logits.argmax(-1)
    drawn = sample(logits, params)
    logprobs = sampling.backend("logprob", logits).token_logprobs(logits, best, 1 / params.temperature, drawn.min_logit)
    return sampling.SampledTokens(best, logprobs[0], drawn.min_logit)


def wrong_seed(logits, params, sample):
    return sample(logits, params._replace(seed=params.seed + 1))


def wrong_position(logits, params, sample):
    return sample(logits, params._replace(position=params.position - 1))


def one_more_kept(logits, params, sample):
    return sample(logits, params._replace(top_k=params.top_k + 1))


def repeated_noise(logits, params, sample):
    """All rows of a batch share the noise of the first."""
    return sample(logits, params._replace(seed=params.seed[:1].expand_as(params.seed).contiguous()))


def wider_nucleus(logits, params, sample):
    return sample(logits, params._replace(top_p=params.top_p + 0.03))


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        SamplingParams(n=2, max_tokens=9),
        SamplingParams(max_tokens=9, temperature=0),
        SamplingParams(max_tokens=9, top_k=2**40, top_p=1e-60),  # more than a vocabulary, and 0 in fp32
    ],
)
def test_every_honest_draw_can_be_repeated(params):
    samples = generate(params)
    audit = audited(samples, params, ppo_max_token_len_per_gpu=40, shuffle=True)
    metrics = audit.metrics()
    assert metrics["bitwise/tokens_redrawn"] == sum(len(s.token_ids) for s in samples)
    assert metrics["bitwise/tokens_redrawn_different"] == 0
    assert metrics["bitwise/tokens_different"] == 0


@pytest.mark.parametrize(
    ("planted", "hint"),
    [
        (argmax, "ignore its noise"),
        (wrong_seed, "look at the seed"),
        (wrong_position, "look at the seed"),
        (repeated_noise, "look at the seed"),
        (one_more_kept, "kept set differs"),
        (wider_nucleus, "kept set differs"),
    ],
)
def test_a_sampler_that_draws_otherwise_is_found_although_its_log_probabilities_are_true(monkeypatch, planted, hint):
    with_sampler(monkeypatch, planted)
    samples = generate()
    monkeypatch.undo()
    audit = audited(samples, exactness="warn")
    assert audit.metrics()["bitwise/tokens_different"] == 0
    assert audit.metrics()["bitwise/tokens_redrawn_different"] > 0
    with pytest.raises(DrawError, match=rf"request [abc]/\d, response position \d+, .*{hint}"):
        audited(samples)


@pytest.mark.parametrize(
    "changed", [{"seed": 6}, {"temperature": 0.91}, {"top_k": 21}, {"top_p": 1.0, "top_k": -1}, {"min_p": 0.2}]
)
def test_settings_that_were_not_asked_for_are_found(changed):
    with pytest.raises(DrawError):
        audited(generate(), dataclasses.replace(PARAMS, **changed))


def test_what_a_failed_draw_raises_leaves_the_weights_untouched(monkeypatch):
    with_sampler(monkeypatch, wrong_seed)
    samples = generate()
    monkeypatch.undo()
    actor = Actor(random_model(CONFIG, seed=1), ActorConfig(optim=OptimConfig(lr=1e-2)))
    before = [p.detach().clone() for p in actor.model.parameters()]
    audit = Audit("strict", 1.0)
    audit.begin(samples, [draw_settings(PARAMS, SEED, s.request_id) for s in samples])
    with pytest.raises(DrawError):
        actor.update(
            [TrainSequence(s, np.ones(len(s.token_ids), np.float32)) for s in samples], audit.check, redraw=audit.redraw
        )
    assert all(torch.equal(a, b) for a, b in zip(before, actor.model.parameters(), strict=True))


def test_a_share_is_chosen_by_request_and_position_whatever_the_packing():
    samples = generate()
    counts = [
        audited(samples, ratio=0.3, ppo_max_token_len_per_gpu=budget).metrics()["bitwise/tokens_redrawn"]
        for budget in (20, 60, 4000)
    ]
    assert counts[0] == counts[1] == counts[2]
    assert 0.1 < counts[0] / sum(len(s.token_ids) for s in samples) < 0.5


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_redraw_changes_no_bit_of_training(fsdp):
    samples = generate()
    sequences = [TrainSequence(s, np.linspace(-1, 1, len(s.token_ids), dtype=np.float32)) for s in samples]
    weights = []
    for ratio in (0.0, 1.0):
        actor = Actor(random_model(CONFIG, seed=1), ActorConfig(fsdp=fsdp, optim=OptimConfig(lr=1e-2)))
        audit = Audit("strict", ratio)
        audit.begin(samples, [draw_settings(PARAMS, SEED, s.request_id) for s in samples])
        actor.update(sequences, audit.check, redraw=audit.redraw)
        weights.append([tensor.clone() for _, tensor in actor.named_weights()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_every_token_is_compared_when_asked_to_be():
    """Three mini-batches: without the extra forward only the first is looked at."""
    samples = generate()
    everything = sum(len(s.token_ids) for s in samples)
    first = audited(samples, ppo_mini_batch_size=3, shuffle=True)
    assert first.metrics()["bitwise/tokens_compared"] < everything
    audit = audited(samples, every_token=True, ppo_mini_batch_size=3, shuffle=True, ppo_epochs=2)
    assert audit.metrics()["bitwise/tokens_compared"] == everything
    assert audit.metrics()["bitwise/tokens_redrawn"] == everything
    assert audit.metrics()["bitwise/tokens_different"] == 0


def test_a_bit_outside_the_first_mini_batch_is_found_when_every_token_is_compared():
    samples = generate()
    changed = samples[-1].logprobs.copy()
    changed[2] = np.nextafter(changed[2], np.float32(0))
    samples[-1] = dataclasses.replace(samples[-1], logprobs=changed)
    audited(samples, ppo_mini_batch_size=3)
    audit = audited(samples, exactness="warn", every_token=True, ppo_mini_batch_size=3)
    assert audit.metrics()["bitwise/tokens_different"] == 1
    assert audit.metrics()["bitwise/first_different_position"] == 2
