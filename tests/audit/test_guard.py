"""The guard finds reductions outside the operators, and there are none in rollout and training forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moe_configs import MOONLIGHT, QWEN3_MOE

from vexact.audit.guard import ReductionGuard, watch
from vexact.models import ModelConfig, random_model
from vexact.ops import PackedMetadata, linear
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig
from vexact.types import TrainSequence

RAW = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
PARAMS = SamplingParams(n=2, max_tokens=6, ignore_eos=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)


def model(ops="invariant", attn_impl="triton-invariant", raw=RAW):
    return random_model(ModelConfig.from_hf_dict(raw), seed=0, ops=ops, attn_impl=attn_impl)


def names(guard):
    return {finding.op.split(".")[1] for finding in guard.findings}


def rollout(of):
    return Engine(model=of, max_model_len=64, max_num_batched_tokens=7).generate([[1, 2, 3] * 4, [4, 5]], PARAMS)


@pytest.mark.parametrize("raw", [RAW, QWEN3_MOE, MOONLIGHT], ids=["dense", "qwen3-moe", "moonlight"])
def test_rollout_and_training_forward_reduce_only_inside_the_operators(raw):
    samples = []
    guard = watch(lambda: samples.extend(rollout(model(raw=raw))))
    assert guard.findings == []
    assert guard.num_inside > 50
    actor = Actor(model(raw=raw), ActorConfig(ppo_mini_batch_size=1, ppo_max_token_len_per_gpu=64, dtype="float32"))
    sequences = [TrainSequence(sample, np.zeros(len(sample.token_ids), np.float32)) for sample in samples]
    guard = watch(lambda: actor.logprobs(sequences))
    assert guard.findings == []
    assert guard.num_inside > 10


def test_the_stock_operators_are_found():
    found = names(watch(lambda: rollout(model(ops="stock", attn_impl="sdpa"))))
    assert found & {"mm", "addmm", "linear", "matmul"}
    assert any("rms_norm" in name or name == "mean" for name in found)
    assert any("scaled_dot_product" in name for name in found)


def test_one_stock_operator_among_invariant_ones_is_named_with_its_caller():
    tokens = torch.arange(5)
    metadata = PackedMetadata.from_lengths([5])
    stock = model(attn_impl="sdpa")
    with torch.no_grad():
        guard = watch(lambda: stock(tokens, tokens, metadata))
    (finding,) = guard.findings
    assert "scaled_dot_product" in finding.op
    assert finding.where.startswith("stock/dense.py:")
    assert finding.count == 2, "once per layer"
    assert "times" in str(finding)


@pytest.mark.parametrize(
    ("expected", "call"),
    [
        ("mm", lambda x: x @ x.T),
        ("bmm", lambda x: torch.bmm(x[None], x[None])),
        ("addmm", lambda x: torch.addmm(x, x, x)),
        ("sum", lambda x: x.sum()),
        ("mean", lambda x: x.mean(0)),
        ("_softmax", lambda x: x.softmax(-1)),
        ("_log_softmax", lambda x: x.log_softmax(-1)),
        ("native_layer_norm", lambda x: F.layer_norm(x, (8,))),
        ("cumsum", lambda x: x.cumsum(0)),
        ("convolution", lambda x: F.conv1d(x[None], torch.ones(2, 8, 3))),
        ("index_add_", lambda x: x.clone().index_add_(0, torch.tensor([0, 0]), x[:2])),
        ("scatter_add", lambda x: x.scatter_add(0, torch.zeros(1, 8, dtype=torch.long), x)),
        ("index_put_", lambda x: x.clone().index_put_((torch.tensor([0]),), x[:1], accumulate=True)),
        ("logsumexp", lambda x: x.logsumexp(-1)),
        ("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x)),
    ],
)
def test_every_kind_of_reduction_is_found(expected, call):
    x = torch.randn(8, 8)
    assert expected in names(watch(lambda: call(x)))


def test_what_has_no_order_is_not_a_finding():
    x = torch.randn(8, 8)

    def run():
        x.amax(), x.argmax(), x[torch.tensor([1, 2])], x + x, torch.arange(9).cumsum(0), torch.arange(9).sum()
        x.clone()[torch.tensor([0])] = 1.0

    assert watch(run).findings == []


def test_a_gradient_of_an_invariant_operator_is_inside_and_torchs_is_not():
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(3, 8, requires_grad=True)
    with ReductionGuard() as guard:
        linear(x, weight).backward(torch.ones(4, 3))
    assert guard.findings == []
    assert guard.num_inside >= 3
    out = F.linear(x, weight)
    assert "mm" in names(watch(lambda: out.backward(torch.ones(4, 3))))


def test_watching_changes_no_result():
    plain, watched = rollout(model()), []
    watch(lambda: watched.extend(rollout(model())))
    for a, b in zip(plain, watched, strict=True):
        assert a.token_ids == b.token_ids
        assert np.array_equal(a.logprobs.view(np.int32), b.logprobs.view(np.int32))
