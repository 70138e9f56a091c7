"""Ranks that share micro-batches, as Gloo processes: the log-probabilities of one rank, and its gradients."""

import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from moe_configs import QWEN3_MOE
from ranks import spawn
from ranks_support import WEIGHED, without_times
from training_support import assert_same_bits, gradients_of_update, kept_bytes, tiny_model, weights_of

from vexact.config.memory import ModelShape
from vexact.config.memory.activations import layer_bytes_per_token
from vexact.models.sequence_parallel import HeadExchange, SlicedMetadata
from vexact.ops import PackedMetadata, attention
from vexact.training import Actor, ActorConfig, OptimConfig, Reference
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.parallel.ranks import unsharded
from vexact.training.parallel.sequence_parallel import SequenceRanks, check_size
from vexact.training.passes.redraw import Redraw
from vexact.types import DrawSettings, Sample, TrainSequence

WORLD = 4
LENGTHS = [(5, 3), (2, 88), (9, 7), (1, 1), (30, 11), (4, 6), (3, 2), (11, 13)]  # prompt and response; one spans slices
UNTIED = {"tie_word_embeddings": False}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
EXPERTS = QWEN3_MOE | {"vocab_size": 53, "num_hidden_layers": 2}
TWELVE_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 3}  # groups of four, which two and four ranks cut
LATENT = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": 4},
    **{"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10},
    "head_dim": None,
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 12},
    **{"first_k_dense_replace": 1, "routed_scaling_factor": 2.0, "n_group": 1, "topk_group": 1},
}
KEPT = [(2, {}), (4, {}), (2, TWELVE_HEADS), (4, TWELVE_HEADS)]
ALONE = ("fp32, tied", "bf16, untied, checkpointed")  # also on two ranks without the others
CASES = {
    "fp32, tied": ({}, {}),
    "bf16, tied": ({}, {"dtype": "bfloat16"}),
    "fp32, untied, entropy": (UNTIED, {"entropy_coeff": 0.01, "use_kl_loss": True}),
    "bf16, untied, checkpointed": (UNTIED | TWELVE_HEADS, {"dtype": "bfloat16", "enable_gradient_checkpointing": True}),
    "fp32, sequence-level loss": (LLAMA | TWELVE_HEADS, {"loss_mode": "gspo"}),
    "bf16, experts": (EXPERTS, {"dtype": "bfloat16", "router_aux_loss_coef": 0.2}),
    "fp32, latent attention and experts": (
        LATENT,
        {"enable_gradient_checkpointing": True, "router_bias_update_rate": 0.01, "router_aux_loss_coef": 0.1},
    ),
    "fp32, biases": (
        QWEN2,
        {"loss_agg_mode": "seq-mean-token-mean", "enable_gradient_checkpointing": True}
        | {"loss_mode": "reinforce", "correction": WEIGHED},
    ),
}


def sequences():
    rng, made = np.random.default_rng(0), []
    for i, (prompt, response) in enumerate(LENGTHS):
        tokens = rng.integers(0, 53, prompt + response).tolist()
        old, ref = rng.normal(-4.0, 0.3, (2, response)).astype(np.float32)
        floor = np.full(response, -np.inf, np.float32)
        sample = Sample(f"request-{i}", tuple(tokens[:prompt]), tuple(tokens[prompt:]), old, floor, 0.8, "stop", 0)
        made.append(TrainSequence(sample, rng.normal(size=response).astype(np.float32), ref))
    return made


def actor_of(case, size, group=None, **more):
    model, config = CASES[case]
    settings = {"ppo_max_token_len_per_gpu": 92 // size, "ulysses_sequence_parallel_size": size, "grad_clip": math.inf}
    config = ActorConfig(ppo_mini_batch_size=8, optim=OptimConfig(lr=1e-2), **(settings | config | more))
    return Actor(tiny_model(**model), config, group=group)


def redraw_of(samples):
    settings = [DrawSettings(seed=i, temperature=0.8, top_k=0, top_p=0.9, min_p=0.0) for i in range(len(samples))]
    return Redraw([s.sample for s in samples], settings, 0.5)


def outcome(case, size, group=None, **more):
    """What one actor says of the sequences: log-probabilities, audited and redrawn tokens, gradients and weights."""
    chosen = sequences()
    actor, audited, redraw = actor_of(case, size, group, **more), {}, redraw_of(chosen)
    scored = actor.rescore(chosen)
    metrics, gradients = gradients_of_update(
        actor, chosen, audit=lambda indices, values, _: audited.update(zip(indices, values, strict=True)), redraw=redraw
    )
    return {
        "logprobs": scored.logprobs,
        "routes": scored.routes,
        "audited": audited,
        "redrawn": redraw.take(),
        "metrics": without_times(metrics),
        "gradients": {name: unsharded(gradient).float() for name, gradient in gradients.items()},
        "weights": weights_of(actor),
    }


def kept_by_a_further_layer(size, heads):
    models = [tiny_model(dtype=torch.bfloat16, num_hidden_layers=layers, **heads) for layers in (2, 3)]
    sharing = SequenceRanks.of_process(size)
    batch = pack_tokens([TokenSequence([1] * 20, [2] * 30), TokenSequence([3], [4] * 9)], sharing=sharing)
    few, many = (kept_bytes(model, batch) for model in models)
    return (many - few) / len(batch.input_ids)


def two_widths(size, dtype):
    """Attention of latent heads, keys wider than values: this rank's rows and gradients, and those of one rank."""
    exchange, generator = HeadExchange(SequenceRanks.of_process(size).group, size), torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(20, 4, width, generator=generator).to(dtype) for width in (24, 24, 16, 16))
    packed = PackedMetadata.from_lengths([13, 7])
    rank = dist.get_rank() % size
    mine = slice(rank * 20 // size, (rank + 1) * 20 // size)

    def attend(metadata, rows):
        inputs = [x[rows].clone().requires_grad_() for x in (q, k, v)]
        sliced = isinstance(metadata, SlicedMetadata)
        out = metadata.attend(attention, *inputs, 0.2) if sliced else attention(*inputs, metadata, 0.2)
        return out.detach(), *torch.autograd.grad(out, inputs, dout[rows])

    whole = [x[mine] for x in attend(packed, slice(None))]
    return list(zip(attend(SlicedMetadata(packed, exchange), mine), whole, strict=True))


def work(rank, directory):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), WORLD)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    assert SequenceRanks.of_process(2).group._get_backend(torch.device("cpu")).options._timeout == limit
    everything = sequences()
    found = {(size, case): outcome(case, size) for case in CASES for size in (2, 4)}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found["on two ranks"] = {case: outcome(case, 2, pairs[rank // 2])["weights"] for case in ALONE}
    found["again"] = outcome("fp32, biases", 4)["weights"]
    found["not checkpointed"] = outcome("fp32, biases", 4, enable_gradient_checkpointing=False)["weights"]
    found["two widths"] = [two_widths(size, dtype) for size in (2, 4) for dtype in (torch.float32, torch.bfloat16)]
    config = ActorConfig(ppo_max_token_len_per_gpu=30, ulysses_sequence_parallel_size=4)
    found["reference"] = Reference(tiny_model(), config).logprobs(everything)
    found["kept"] = [kept_by_a_further_layer(size, heads) for size, heads in KEPT]
    with pytest.raises(ValueError, match=r"request-1 has 89 tokens, more than .*per_gpu x .*parallel_size=80"):
        actor_of("fp32, tied", 4, ppo_max_token_len_per_gpu=20).logprobs(everything)
    with pytest.raises(ValueError, match=r"=3: 4 training ranks cannot .*use 1, 2 or 4, or train on a multiple of 3"):
        actor_of("fp32, tied", 3)
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    (directory,) = spawn(work, WORLD, lambda: (str(tmp_path_factory.mktemp("sequence_parallel")),))
    return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    return {case: outcome(case, 1) for case in CASES}


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_log_probabilities_are_those_of_one_rank(ranks, alone, case, size):
    for rank in range(WORLD):
        assert_same(ranks[rank][size, case]["logprobs"], alone[case]["logprobs"])
        assert_same(ranks[rank][size, case]["routes"] or (), alone[case]["routes"] or ())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_one_rank_of_those_that_share_reports_to_the_audit(ranks, alone, case, size):
    reports = [ranks[rank][size, case]["audited"] for rank in range(WORLD)]
    assert all(bool(report) == (rank % size == 0) for rank, report in enumerate(reports))
    assert sorted(index for report in reports for index in report) == list(range(8))
    for report in reports:
        for index, values in report.items():
            assert_same([values], [alone[case]["audited"][index]])


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_repeats_the_draws_of_its_own_tokens(ranks, alone, size):
    for case in CASES:
        shares = [ranks[rank][size, case]["redrawn"] for rank in range(WORLD)]
        assert all(len(share.sequences) for share in shares)
        joined = [np.concatenate([getattr(share, name) for share in shares]) for name in shares[0].__slots__]
        expected = [getattr(alone[case]["redrawn"], name) for name in shares[0].__slots__]
        for one in (joined, expected):
            order = np.lexsort((one[1], one[0]))
            one[:] = [column[order] for column in one]
        for got, wanted in zip(joined, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_and_metrics_are_those_of_one_rank_but_for_rounding(ranks, alone, case, size):
    tolerance = 3e-2 if "bf16" in case else 2e-5
    for rank in range(WORLD):
        found = ranks[rank][size, case]
        for name, gradient in alone[case]["gradients"].items():
            error = (found["gradients"][name] - gradient).abs().max() / gradient.abs().max()
            assert error < tolerance, (name, error)
        assert found["metrics"] == pytest.approx(alone[case]["metrics"], rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_biases_of_routers_are_those_of_one_rank(ranks, alone, size):
    """What moves them are whole numbers; no rank counts a token that fills its slice up."""
    name = "layers.1.mlp.router.bias"
    expected = alone["fp32, latent attention and experts"]["weights"][name]
    assert expected.any()
    for rank in range(WORLD):
        assert torch.equal(ranks[rank][size, "fp32, latent attention and experts"]["weights"][name], expected)


def test_weights_depend_on_how_many_share_and_on_nothing_else(ranks):
    for rank in range(WORLD):
        for run in ("again", "not checkpointed"):
            assert_same_bits(ranks[rank][run], ranks[0][4, "fp32, biases"]["weights"])
        for case, weights in ranks[rank]["on two ranks"].items():
            assert_same_bits(weights, ranks[0][2, case]["weights"])


def test_the_reference_shares_as_well(ranks):
    expected = Reference(tiny_model(), ActorConfig()).logprobs(sequences())
    for rank in range(WORLD):
        assert_same(ranks[rank]["reference"], expected)


def test_heads_whose_keys_are_wider_than_their_values_are_shared(ranks):
    for rank in range(WORLD):
        for (out, expected), *gradients in ranks[rank]["two widths"]:
            assert out.shape[1:] == (4, 16)
            assert torch.equal(out, expected)
            for got, wanted in gradients:
                torch.testing.assert_close(got, wanted, rtol=1e-5 if got.dtype == torch.float32 else 2e-2, atol=1e-5)


def test_a_rank_keeps_the_activations_that_are_predicted(ranks):
    for at, (size, heads) in enumerate(KEPT):
        predicted = layer_bytes_per_token(ModelShape.of(tiny_model(**heads).config.raw), 2, size)
        assert [ranks[rank]["kept"][at] for rank in range(WORLD)] == [predicted] * WORLD


@pytest.mark.parametrize(
    ("size", "num_ranks", "num_heads", "message"),
    [
        (2, 1, 4, r"=2: 1 training rank cannot be divided into groups of 2; use 1, or train on a multiple of 2 GPUs"),
        (4, 6, 4, r"=4: 6 training ranks cannot be divided into groups of 4; use 1 or 2, or train on"),
        (8, 8, 12, r"=8: the model's 12 attention heads cannot be divided over 8 ranks; use 1, 2 or 4$"),
        (5, 10, 14, r"=5: the model's 14 attention heads cannot be divided over 5 ranks; use 1 or 2$"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(size, num_ranks, num_heads, message):
    with pytest.raises(ValueError, match=message):
        check_size(size, num_ranks, num_heads)
