"""The stock rollout decodes in graphs, says what it attends with, and differs from the exact one in some bits only."""

from __future__ import annotations

import logging

import pytest
import torch
from moe_configs import QWEN3_MOE
from replayed_graphs import install
from rollout_models import bits, tiny_config, tiny_model, training_logprobs

from vexact.config import baseline as rule
from vexact.models import ModelConfig, load_model, random_model, save_hf
from vexact.ops import PackedMetadata, stock
from vexact.ops.stock import paged
from vexact.rollout import Engine, SamplingParams, baseline

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("stock")
    save_hf(tiny_model().named_parameters(), tiny_config(), path)
    return path


def decoded(engine):
    samples = engine.generate(PROMPTS, GREEDY)
    return samples, [(sample.token_ids, bits(sample.logprobs)) for sample in samples]


def test_it_decodes_in_graphs_with_attention_of_its_own_and_says_so(checkpoint, caplog):
    with caplog.at_level(logging.INFO):
        graphs = Engine(checkpoint, batch_invariant=False, max_model_len=64)
    assert graphs.attention == "triton-invariant (FlashAttention runs on CUDA only)"
    assert f"attention: {graphs.attention}" in caplog.text
    assert Engine(checkpoint, max_model_len=64).attention == "triton-invariant"
    install(graphs, sizes=(3,), num_keys=(64,))
    _, replayed = decoded(graphs)
    stats = graphs.stats()
    assert (stats["rollout/graph_ratio"] > 0.8, stats["rollout/own_attention"]) == (True, 1.0)
    assert replayed == decoded(Engine(checkpoint, batch_invariant=False, max_model_len=64))[1]
    assert "rollout/own_attention" not in Engine(checkpoint, max_model_len=64).stats()


def test_the_mismatch_stays_visible(checkpoint):
    samples, _ = decoded(Engine(checkpoint, batch_invariant=False, max_model_len=64))
    exact = training_logprobs(load_model(checkpoint), samples)
    pairs = [
        (one, other)
        for sample, logprobs in zip(samples, exact, strict=True)
        for one, other in zip(sample.logprobs.tolist(), logprobs.tolist(), strict=True)
    ]
    assert sum(one != other for one, other in pairs) > 0
    assert max(abs(one - other) for one, other in pairs) < 1e-3


def test_sdpa_runs_by_name_only_and_uncaptured(checkpoint):
    engine = Engine(checkpoint, batch_invariant=False, attn_impl="sdpa", max_model_len=64)
    assert engine.attention == "sdpa (padded and gathered, no CUDA graphs)"
    assert engine.model.layers[0].attention.ops.attention is stock.attention
    install(engine, sizes=(3,), num_keys=(64,))
    decoded(engine)
    stats = engine.stats()
    assert (stats["rollout/graph_ratio"], stats["rollout/own_attention"]) == (0, 0)


def reader(q, k, v, metadata, scale, causal):
    """A paged FlashAttention that runs here."""
    nowhere = torch.full((len(q),), -1)
    new = k.new_zeros(len(q), *k.shape[2:])
    longest = metadata.max_seqlen_q, k.shape[1] * metadata.block_table.shape[1]
    moved = type(metadata)(metadata.cu_seqlens_q, metadata.seqused_k, metadata.block_table, nowhere, *longest)
    return stock.attention(q, new, new, moved, scale, (k, v), causal)


@pytest.fixture
def flash(monkeypatch):
    """As on a GPU where FlashAttention reads pages."""
    real = rule.baseline_attention
    monkeypatch.setattr(rule, "paged_flash_attention", lambda: ("torch 9.9", ""))
    monkeypatch.setattr(
        baseline, "baseline_attention", lambda asked, device, dtype, **more: real(asked, "cuda", "bfloat16", **more)
    )
    monkeypatch.setattr(paged, "check_tensors", lambda *tensors: None)
    monkeypatch.setattr(paged, "reader", lambda: reader)


@pytest.mark.parametrize("asked", ["triton-invariant", "flash_attention_2"])
def test_flash_attention_reads_pages_of_its_size_in_graphs(checkpoint, flash, asked):
    engine = Engine(checkpoint, batch_invariant=False, attn_impl=asked, max_model_len=64, page_size=64, num_pages=9)
    assert engine.attention == "flash_attention_2 (torch 9.9, pages of a multiple of 256)"
    assert (engine.config.page_size, engine.config.num_pages, engine.num_pages) == (256, 3, 3)
    assert rule.PAGE_MULTIPLE == paged.PAGE_MULTIPLE
    install(engine, sizes=(3,), num_keys=(64,))
    _, replayed = decoded(engine)
    stats = engine.stats()
    assert (stats["rollout/graph_ratio"] > 0.8, stats["rollout/own_attention"]) == (True, 0)
    sdpa = Engine(checkpoint, batch_invariant=False, attn_impl="sdpa", max_model_len=64)
    assert [tokens for tokens, _ in replayed] == [tokens for tokens, _ in decoded(sdpa)[1]]


def test_one_that_gives_wrong_numbers_is_not_used(checkpoint, flash, monkeypatch):
    monkeypatch.setattr(paged, "reader", lambda: lambda q, *rest: torch.zeros_like(q))
    engine = Engine(checkpoint, batch_invariant=False, max_model_len=64)
    assert engine.attention == "triton-invariant (paged FlashAttention gives wrong numbers here, off by 1)"
    assert engine.config.page_size == 64
    assert engine.model.layers[0].attention.ops.attention is load_model(checkpoint).ops.attention


def test_experts_are_captured_where_their_product_can_be(tmp_path):
    config = ModelConfig.from_hf_dict(QWEN3_MOE)
    save_hf(random_model(config, 0).named_parameters(), config, tmp_path)
    engine = Engine(tmp_path, batch_invariant=False, max_model_len=64)
    install(engine, sizes=(3,), num_keys=(64,))
    decoded(engine)
    assert engine.stats()["rollout/graph_ratio"] == 0  # on a CPU torch has one product per expert


@pytest.mark.gpu
def test_on_a_gpu_it_decodes_in_graphs_close_to_the_exact_log_probabilities(tmp_path):
    """Dense and with experts; whatever attention is installed."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    dense = tiny_config(max_position_embeddings=4096, initializer_range=0.05, **sizes)
    widths = {"vocab_size": 256, "hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 64}
    experts = ModelConfig.from_hf_dict(QWEN3_MOE | widths | {"initializer_range": 0.05})
    for name, config in (("dense", dense), ("experts", experts)):
        path = tmp_path / name
        save_hf(random_model(config, 0).named_parameters(), config, path)
        engine = Engine(path, batch_invariant=False, dtype="bfloat16", max_model_len=256, max_num_seqs=24)
        prompts = [[7 + index] * (1 + 9 * index) for index in range(20)]
        samples = engine.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
        assert engine.stats()["rollout/graph_ratio"] > 0.8
        exact = Engine(path, dtype="bfloat16", max_model_len=256).model
        pairs = []
        for sample in samples:
            tokens = torch.tensor([*sample.prompt_token_ids, *sample.token_ids], device="cuda")
            packed = PackedMetadata.from_lengths([len(tokens)], "cuda")
            with torch.no_grad():
                logits = exact.logits(exact(tokens, torch.arange(len(tokens), device="cuda"), packed))
            rows = logits.log_softmax(1)[len(sample.prompt_token_ids) - 1 : -1]
            wanted = rows.gather(1, tokens[len(sample.prompt_token_ids) :, None]).squeeze(1).tolist()
            pairs += zip(sample.logprobs.tolist(), wanted, strict=True)
        distances = torch.tensor(pairs).diff(dim=1).abs()
        assert (distances > 0).any()
        assert distances.mean() < 0.05
