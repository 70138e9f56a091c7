"""Steps that are launched ahead on a GPU: no bit differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ahead_support import SYNC, fingerprint
from rollout_models import GPU_SIZES, tiny_model

from vexact.rollout import Engine, SamplingParams

LONG, TIGHT = (3, 17, 90, 700, 2040, 2050, 33, 1), (60, 61, 62, 63, 33, 20)


def gpu_requests(rng, lengths):
    """Greedy, free and truncated, ends by surprise and by length."""
    prompts = [rng.integers(0, 1000, length).tolist() for length in lengths]
    params = [
        SamplingParams(
            n=1 + 3 * (index % 2),
            max_tokens=150,
            temperature=0.8 * (index % 3 > 0),
            top_p=(1.0, 0.9)[index % 2],
            stop_token_ids=list(range(index, 1000, 200)),
        )
        for index in range(len(prompts))
    ]
    return prompts, params


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "num_pages"), [(LONG, 64), (TIGHT, 9)], ids=["long", "tight"])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_launching_ahead_changes_no_bit_on_a_gpu(lengths, num_pages, eager):
    """Chunks beside decodes and several key buckets, or preemption; and weights that change between two calls."""
    config = {
        "max_model_len": 2200,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 512,
        "num_pages": num_pages,
        "enforce_eager": eager,
        "eos_token_ids": [7],
    }
    engines = [
        Engine(model=tiny_model(0, torch.bfloat16, max_position_embeddings=4096, **GPU_SIZES).cuda(), **config, **mode)
        for mode in (SYNC, {})
    ]
    found = [[], []]
    for version in range(2):
        prompts, params = gpu_requests(np.random.default_rng(version), lengths)
        update = tiny_model(version, torch.bfloat16, max_position_embeddings=4096, **GPU_SIZES).cuda()
        for engine, samples in zip(engines, found, strict=True):
            engine.update_weights(update.named_parameters(), version)
            ids = [f"{version}-{index}" for index in range(len(prompts))]
            samples += map(fingerprint, engine.generate(prompts, params, ids))
    assert found[0] == found[1]
    assert len({one[3] for one in found[0]}) == 2, "by length and by a stop token"
    stats = [engine.stats() for engine in engines]
    assert [one["rollout/async_ratio"] > 0.5 for one in stats] == [False, True]
    assert lengths is LONG or all(one["rollout/preemptions"] > 0 for one in stats)
    assert all((one["rollout/graph_ratio"] > 0.3) is not eager for one in stats)
