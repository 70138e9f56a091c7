"""The mismatch dial: every mode disagrees with the trainer, and only as much as it is told to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from rollout_models import VOCAB, bits, tiny_config, training_logprobs

from vexact.models import load_model, random_model, save_hf
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.mismatch import MODES, gaussian

PROMPTS = [[(7 * i + j) % (VOCAB - 1) for j in range(5 + i)] for i in range(6)]
PARAMS = SamplingParams(n=2, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("mismatch")
    config = tiny_config()
    save_hf(random_model(config, seed=0).named_parameters(), config, path)
    return path


def generate(checkpoint, mode="none", scale=1.0, **config):
    engine = Engine(checkpoint, max_model_len=64, mismatch_mode=mode, mismatch_scale=scale, **config)
    return engine.generate(PROMPTS, PARAMS, [f"r{i}" for i in range(len(PROMPTS))])


def gaps(checkpoint, samples):
    """|rollout - trainer| log-probability of every token, and how many differ in bits."""
    trained = np.concatenate(training_logprobs(load_model(checkpoint), samples))
    sampled = np.concatenate([sample.logprobs for sample in samples])
    return np.abs(trained - sampled), int((trained.view(np.int32) != sampled.view(np.int32)).sum())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_every_mode_disagrees_with_the_trainer_and_scale_zero_does_not(checkpoint, mode):
    gap, different = gaps(checkpoint, generate(checkpoint, mode, 0.5 if mode in ("k_order", "softmax_blocks") else 1.0))
    assert different > 0
    if mode in ("k_order", "softmax_blocks"):
        assert gap.max() < 1e-4, "another order of additions is a matter of rounding"
    assert gaps(checkpoint, generate(checkpoint, mode, 0.0))[1] == 0


def test_none_changes_nothing(checkpoint):
    samples = generate(checkpoint)
    assert gaps(checkpoint, samples)[1] == 0
    ready = Engine(model=load_model(checkpoint), max_model_len=64)
    plain = ready.generate(PROMPTS, PARAMS, [f"r{i}" for i in range(len(PROMPTS))])
    assert [(s.token_ids, bits(s.logprobs)) for s in samples] == [(s.token_ids, bits(s.logprobs)) for s in plain]


def test_more_noise_and_more_rounding_are_a_larger_gap(checkpoint):
    noise = [gaps(checkpoint, generate(checkpoint, "noise", scale))[0].mean() for scale in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert all(5 * small < large < 20 * small for small, large in pairwise(noise)), noise
    rounding = [gaps(checkpoint, generate(checkpoint, "bf16_logits", scale))[0].mean() for scale in (0.1, 0.5, 1.0)]
    assert rounding[0] < rounding[1] < rounding[2]


def test_more_changed_layers_change_more_tokens(checkpoint):
    model = load_model(checkpoint)
    engines = [Engine(checkpoint, max_model_len=64, mismatch_mode="k_order", mismatch_scale=s) for s in (0.5, 1.0)]
    changed = [sum(layer.mlp.ops != model.layers[0].mlp.ops for layer in engine.model.layers) for engine in engines]
    assert changed == [1, 2]
    assert all(engine.model.ops == model.ops for engine in engines), "the head is not a layer"


def test_noise_depends_on_the_request_not_on_batch_and_scheduling(checkpoint):
    whole = generate(checkpoint, "noise", 0.3)
    alone = generate(checkpoint, "noise", 0.3, max_num_seqs=1, page_size=3, max_num_batched_tokens=4)
    assert [(s.token_ids, bits(s.logprobs)) for s in whole] == [(s.token_ids, bits(s.logprobs)) for s in alone]


def test_noise_is_standard_normal_and_keyed_by_row_column_and_seed():
    hidden = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    noise = gaussian(hidden, 5000, seed=3)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise**4).mean()) - 3) < 0.2
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.07
    assert torch.equal(gaussian(hidden[3:4], 100, seed=3), noise[3:4, :100])
    assert not torch.equal(gaussian(hidden, 5000, seed=4), noise)
    assert torch.isfinite(gaussian(hidden, 8, seed=2**63 + 5)).all()


def test_mistakes_are_named(checkpoint):
    with pytest.raises(ValueError, match="mismatch_mode='nois' is unknown; use one of none, k_order"):
        Engine(checkpoint, mismatch_mode="nois")
    with pytest.raises(ValueError, match=r"mismatch_scale=2\.0: k_order takes a share"):
        Engine(checkpoint, mismatch_mode="k_order", mismatch_scale=2.0)
    with pytest.raises(ValueError, match="mismatch_mode='noise' needs model_path"):
        Engine(model=load_model(checkpoint), mismatch_mode="noise")
