"""Decode steps that run in graphs give the bits of eager steps. On the CPU a stand-in plays the graph."""

from __future__ import annotations

import copy
import dataclasses
import logging
import random

import numpy as np
import pytest
import torch
from moe_configs import MOONLIGHT, QWEN3_MOE
from replayed_graphs import install
from rollout_models import GPU_SIZES, VOCAB, bits, tiny_model
from torch import nn

from vexact.audit.guard import ReductionGuard
from vexact.models import ModelConfig, random_model
from vexact.models.opset import mark_replayable, set_ops
from vexact.ops import stock
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.execution.cuda_capture import ran_out_of_memory
from vexact.rollout.execution.decode_buckets import DecodeBuckets, GraphKey, batch_buckets, key_buckets
from vexact.rollout.execution.decode_graphs import decode_graphs
from vexact.rollout.execution.decode_inputs import DecodeInputs
from vexact.rollout.mismatch import apply_mismatch

MAX_LEN = 160
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def workload(seed):
    """Prompts around the edges of key buckets; greedy, free and truncated sampling side by side."""
    rng = random.Random(seed)
    prompts, params = [], []
    lengths = [30, 60, *rng.choices([1, 2, 27, 31, 32, 63, 100], k=rng.randint(3, 7))]
    for length in lengths:
        prompts.append([rng.randrange(VOCAB - 1) for _ in range(length)])
        params.append(
            SamplingParams(
                n=rng.choice([1, 1, 2]),
                max_tokens=20 if length in (30, 60) else rng.choice([1, 5, 12, 20]),
                temperature=rng.choice([0.0, 0.7, 1.0]),
                top_k=rng.choice([-1, -1, 5]),
                top_p=rng.choice([1.0, 1.0, 0.8]),
                min_p=rng.choice([0.0, 0.0, 0.05]),
                ignore_eos=True,
            )
        )
    return prompts, params


def generate(engine, prompts, params):
    ids = [f"r{index}" for index in range(len(prompts))]
    return [(s.token_ids, bits(s.logprobs), bits(s.min_logits)) for s in engine.generate(prompts, params, ids)]


def caches(engine):
    return [cache for pair in engine._runner.kv_caches for cache in pair]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def spoiled_inputs(monkeypatch):
    """Before every step, whatever the graphs' tensors held becomes garbage."""
    load = DecodeInputs.load

    def spoil(self, batch, key):
        for inputs in self._static.values():
            inputs.buffer.fill_(0xA5)
        return load(self, batch, key)

    monkeypatch.setattr(DecodeInputs, "load", spoil)


@pytest.mark.parametrize("seed", range(6))
def test_replayed_steps_have_the_bits_of_eager_ones(model, spoiled_inputs, seed):
    """Batch sizes and key counts cross buckets both ways; tight memory preempts; padding writes to no page."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 16])
    knobs = {
        "page_size": page_size,
        "num_pages": -(-MAX_LEN // page_size) * rng.choice([1, 2, 4]),
        "max_num_seqs": rng.choice([3, 8]),
        "max_num_batched_tokens": rng.choice([9, 40, 4096]),
        "max_model_len": MAX_LEN,
        "enable_prefix_caching": rng.random() < 0.5,
    }
    eager, replayed = (Engine(model=model, seed=5, **knobs) for _ in range(2))
    replays = install(replayed, sizes=rng.choice([(1, 2, 4, 8), (3, 8), (5, 8)]), num_keys=(32, 64, MAX_LEN))
    prompts, params = workload(seed)
    assert generate(replayed, prompts, params) == generate(eager, prompts, params)
    assert all(torch.equal(a, b) for a, b in zip(caches(replayed), caches(eager), strict=True))
    expected, stats = eager.stats(), replayed.stats()
    assert (expected["rollout/graph_ratio"], expected["rollout/num_tokens"]) == (0, stats["rollout/num_tokens"])
    assert 0 < stats["rollout/graph_ratio"] < 1
    assert replays.num_captures > 1
    assert replays.num_pools == 1


@pytest.mark.parametrize("raw", [QWEN3_MOE, MOONLIGHT], ids=["qwen3-moe", "moonlight"])
def test_padded_rows_load_no_expert(raw):
    """Bits and routes are those of eager steps, and an expert is computed for real rows alone."""
    model = random_model(ModelConfig.from_hf_dict(raw), 0)
    eager, replayed = (Engine(model=copy.deepcopy(model), max_model_len=64) for _ in range(2))
    install(replayed, sizes=(1, 8), num_keys=(64,))
    group_tokens, seen = model.ops.group_tokens, []

    def watched(experts, num_experts):
        groups = group_tokens(experts, num_experts)
        seen.append((len(experts), int(groups.offsets[-1])))
        return groups

    set_ops(replayed.model, dataclasses.replace(model.ops, group_tokens=mark_replayable(watched, if_is=group_tokens)))
    prompts = [[1, 2, 3], [4, 5], list(range(20, 29))]
    ours, theirs = (engine.generate(prompts, GREEDY, ["a", "b", "c"]) for engine in (replayed, eager))
    assert replayed.stats()["rollout/graph_ratio"] > 0.5
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_ids, bits(one.logprobs)) == (other.token_ids, bits(other.logprobs))
        assert one.route_digests.tolist() == other.route_digests.tolist()
    assert len({digest for sample in ours for digest in sample.route_digests.tolist()}) > 6
    assert {pairs for rows, pairs in seen if rows == 8} == {3 * model.config.moe.top_k}


def test_graphs_survive_preemption(model):
    eager, replayed = (Engine(model=model, page_size=4, num_pages=16, max_model_len=60) for _ in range(2))
    install(replayed, num_keys=(60,))
    prompts, params = [[1, 2, 3]] * 4, SamplingParams(max_tokens=24, ignore_eos=True)
    assert generate(replayed, prompts, params) == generate(eager, prompts, params)
    stats = replayed.stats()
    assert stats["rollout/preemptions"] > 0
    assert stats["rollout/graph_ratio"] > 0.5


def test_a_graph_outlives_a_weight_update(model):
    engine = Engine(model=copy.deepcopy(model), max_model_len=64)
    replays = install(engine, num_keys=(64,))
    first = generate(engine, [[1, 2, 3]], GREEDY)
    update = tiny_model(1)
    engine.update_weights(update.named_parameters(), version=1)
    second = generate(engine, [[1, 2, 3]], GREEDY)
    assert second == generate(Engine(model=update, max_model_len=64), [[1, 2, 3]], GREEDY)
    assert second != first
    assert (replays.num_captures, replays.num_pools) == (1, 1)


def test_weights_in_other_memory_are_captured_again(model):
    engine = Engine(model=copy.deepcopy(model), max_model_len=64)
    replays = install(engine, num_keys=(64,))
    generate(engine, [[1, 2, 3]], GREEDY)
    norm = engine.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().clone())
    generate(engine, [[1, 2, 3]], GREEDY)
    engine.model.layers[1].mlp.down_proj.weight.data = engine.model.layers[1].mlp.down_proj.weight.data.clone()
    generate(engine, [[1, 2, 3]], GREEDY)
    assert replays.num_pools == replays.num_captures == 3


def test_other_operators_drop_the_graphs(model):
    """A mismatch that only computes is captured anew; operators that may work on the host run eagerly."""
    engine = Engine(model=copy.deepcopy(model), max_model_len=64)
    replays = install(engine, num_keys=(64,))
    exact = generate(engine, [[1, 2, 3]], GREEDY)
    clean = engine.model.ops

    apply_mismatch(engine.model, "k_order", 1.0)
    apply_mismatch(engine.model, "noise", 0.5)
    expected = Engine(model=engine.model, max_model_len=64)
    engine.stats()
    noisy = generate(engine, [[1, 2, 3]], GREEDY)
    assert noisy == generate(expected, [[1, 2, 3]], GREEDY) != exact
    assert (replays.num_pools, engine.stats()["rollout/graph_ratio"] > 0) == (2, True)

    calls = []

    def watched(*args):
        calls.append(args[0].shape)
        return clean.swiglu(*args)

    for ops in (dataclasses.replace(clean, swiglu=watched), dataclasses.replace(clean, attention=stock.attention)):
        set_ops(engine.model, ops)
        generate(engine, [[1, 2, 3]], GREEDY)
        assert engine.stats()["rollout/graph_ratio"] == 0
    assert len(calls) == 6 * 2  # six steps of two layers
    set_ops(engine.model, clean)
    assert generate(engine, [[1, 2, 3]], GREEDY) == exact
    assert (replays.num_pools, engine.stats()["rollout/graph_ratio"] > 0) == (3, True)


def test_whoever_watches_sees_every_step(model):
    engine = Engine(model=model, max_model_len=64)
    install(engine, num_keys=(64,))
    exact = generate(engine, [[1, 2, 3]], GREEDY)
    engine.stats()
    seen = []
    engine.observe_logits(lambda logits, params: seen.append(logits.shape))
    assert generate(engine, [[1, 2, 3]], GREEDY) == exact
    engine.observe_logits(None)
    engine._runner.on_sampled = lambda logits, params, sampled: (seen.append(logits.shape), sampled)[1]
    assert generate(engine, [[1, 2, 3]], GREEDY) == exact
    engine._runner.on_sampled = None
    hook = engine.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert generate(engine, [[1, 2, 3]], GREEDY) == exact
    hook.remove()
    assert len(seen) == 3 * 6
    with ReductionGuard():
        generate(engine, [[1, 2, 3]], GREEDY)
    assert engine.stats()["rollout/graph_ratio"] == 0
    assert generate(engine, [[1, 2, 3]], GREEDY) == exact
    assert engine.stats()["rollout/graph_ratio"] > 0


def test_without_memory_decoding_goes_on_eagerly(model, caplog):
    def new_capture():
        def capture(compute):
            try:
                raise torch.cuda.OutOfMemoryError("no memory")
            except RuntimeError:
                raise RuntimeError("the capture was interrupted")  # noqa: B904 - as the end of a capture does

        return capture

    engine = Engine(model=model, max_model_len=64)
    install(engine, num_keys=(64,), new_capture=new_capture)
    with caplog.at_level(logging.WARNING):
        samples = generate(engine, [[1, 2, 3], [4]], GREEDY)
    assert samples == generate(Engine(model=model, max_model_len=64), [[1, 2, 3], [4]], GREEDY)
    assert engine.stats()["rollout/graph_ratio"] == 0
    assert [record.getMessage().count("enforce_eager") for record in caplog.records] == [1]


def test_other_failures_of_a_capture_are_not_hidden(model):
    def new_capture():
        def capture(compute):
            raise RuntimeError("operation not permitted when stream is capturing")

        return capture

    engine = Engine(model=model, max_model_len=64)
    install(engine, num_keys=(64,), new_capture=new_capture)
    with pytest.raises(RuntimeError, match="not permitted"):
        generate(engine, [[1, 2, 3]], GREEDY)
    assert not ran_out_of_memory(RuntimeError("something else"))


def test_larger_batches_than_any_graph_run_eagerly(model):
    eager, replayed = (Engine(model=model, max_model_len=64) for _ in range(2))
    install(replayed, sizes=(2,), num_keys=(64,))
    prompts = [[token] for token in range(5)]
    assert generate(replayed, prompts, GREEDY) == generate(eager, prompts, GREEDY)
    assert replayed.stats()["rollout/graph_ratio"] == 0


def test_batch_buckets():
    assert batch_buckets(1) == (1,)
    assert batch_buckets(7) == (1, 2, 4, 7)
    assert batch_buckets(70) == (1, 2, 4, *range(8, 65, 8), 70)
    assert batch_buckets(200) == (1, 2, 4, *range(8, 65, 8), 80, 96, 112, 128, 160, 192, 200)
    assert batch_buckets(2000)[-3:] == (1920, 1984, 2000)
    assert batch_buckets(256, [512, 8, 1, 8]) == (1, 8, 256)


def test_key_buckets():
    assert key_buckets(2048, 2048) == (2048,)
    assert key_buckets(2048, 100) == (100,)
    assert key_buckets(2048, 8192) == (2048, 4096, 8192)
    assert key_buckets(2048, 9000) == (2048, 4096, 8192, 9000)


def test_the_smallest_bucket_that_holds_a_step():
    buckets = DecodeBuckets((1, 4), (10, 20))
    found = [buckets.find(*step) for step in ((1, 10), (2, 11), (4, 20), (5, 1), (1, 21))]
    assert found == [GraphKey(1, 10), GraphKey(4, 20), GraphKey(4, 20), None, None]


def test_only_a_gpu_has_graphs(model):
    assert decode_graphs(model, Engine(model=model).config, max_model_len=64, device=torch.device("cpu")) is None


@pytest.mark.parametrize("sizes", [(), (0,), (4, -1), (True,), (2.0,)])
def test_bad_capture_sizes_are_refused(model, sizes):
    with pytest.raises(ValueError, match="cudagraph_capture_sizes"):
        Engine(model=model, cudagraph_capture_sizes=sizes)


LENGTHS = (3, 17, 90, 2030, 2040, 4090)  # decoding crosses one and two attention chunks; the short ones end last


def gpu_samples(engine, seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 1000, length).tolist() for length in LENGTHS]
    params = [
        SamplingParams(n=4, max_tokens=8 * (6 - index), temperature=0.8 * (index % 3 > 0), top_p=top_p, ignore_eos=True)
        for index, top_p in enumerate([1.0, 0.9, 1.0, 0.95, 1.0, 0.9])
    ]
    return generate(engine, prompts, params)


@pytest.mark.gpu
@pytest.mark.parametrize("mismatch", ["none", "k_order", "noise", "bf16_logits"])
def test_cuda_graphs_have_the_bits_of_eager_steps(mismatch):
    def build(seed):
        model = tiny_model(seed, torch.bfloat16, max_position_embeddings=8192, **GPU_SIZES).cuda()
        apply_mismatch(model, mismatch, 0.5)
        return model

    config = {"max_model_len": 6000, "max_num_seqs": 24, "kv_cache_bytes": 1 << 28}
    graphs = Engine(model=build(0), **config)
    eager = Engine(model=build(0), enforce_eager=True, **config)
    assert graphs._runner.graphs is not None
    assert eager._runner.graphs is None
    first = gpu_samples(graphs, 0)
    assert first == gpu_samples(eager, 0)
    assert graphs.stats()["rollout/graph_ratio"] > 0.8
    captured = dict(graphs._runner.graphs._replays)
    assert len({key.num_keys for key in captured}) == 3
    for version in (1, 2):
        for engine in (graphs, eager):
            engine.update_weights(build(version).named_parameters(), version)
        samples = gpu_samples(graphs, version)
        assert samples == gpu_samples(eager, version) != first
        assert graphs.stats()["rollout/graph_ratio"] > 0.8
    assert all(graphs._runner.graphs._replays[key] is replay for key, replay in captured.items())
    seen = []
    graphs.observe_logits(lambda logits, params: seen.append(len(logits)))
    assert gpu_samples(graphs, 2) == samples
    assert graphs.stats()["rollout/graph_ratio"] == 0
    assert sum(seen) == sum(len(tokens) for tokens, _, _ in samples)
