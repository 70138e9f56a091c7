"""Predicted activations against what autograd keeps, to the byte, and on a GPU against the allocator's peak."""

import itertools
import sys

import pytest
import torch
from moe_configs import FAMILIES
from training_support import kept_bytes, tiny_model

from vexact.config.memory import ModelShape
from vexact.config.memory.activations import activation_bytes, layer_bytes_per_token
from vexact.models import ModelConfig, random_model
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
EXPERTS = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_further_layer_keeps_what_is_predicted(dtype, recomputed):
    models = [tiny_model(dtype=dtype, num_hidden_layers=layers) for layers in (2, 5)]
    batch = pack_tokens([TokenSequence([1] * 50, [2] * 37), TokenSequence([3], [4] * 10)])
    assert len(batch.input_ids) == 96, "CPU products in fp32 are views of blocks of 48 rows"
    few, many = (kept_bytes(model, batch, len(model.layers) * recomputed) for model in models)
    sizes, width = ModelShape.of(models[0].config.raw), dtype.itemsize
    per_layer = 2 * width * sizes.hidden_size if recomputed else layer_bytes_per_token(sizes, width)
    assert many - few == 3 * per_layer * len(batch.input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_that_is_not_recomputed_keeps_what_is_predicted(dtype):
    batch = pack_tokens([TokenSequence([1] * 50, [2] * 37), TokenSequence([3], [4] * 10)])
    model = tiny_model(dtype=dtype, num_hidden_layers=5)
    sizes, width, tokens = ModelShape.of(model.config.raw), dtype.itemsize, len(batch.input_ids)
    found = [kept_bytes(model, batch, recomputed) for recomputed in range(6)]
    predicted = [activation_bytes(sizes, tokens, width, recomputed=recomputed) for recomputed in range(6)]
    stream = width * sizes.hidden_size * tokens
    more = layer_bytes_per_token(sizes, width) * tokens - 2 * stream
    assert [a - b for a, b in itertools.pairwise(found)] == [more + stream, *[more] * 4]  # one stream enters the first
    # to recompute the last layer as well saves nothing: it is needed at once
    assert [a - b for a, b in itertools.pairwise(predicted)] == [*[more] * 4, -2 * stream]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_of_experts_keeps_what_is_predicted(name, dtype):
    """To the byte but for where the groups of experts begin; latent attention within 3 %."""
    raw = FAMILIES[name] | {"mlp_only_layers": []}
    shapes = [raw | {"num_hidden_layers": count} for count in (3, 5)]
    batch = pack_tokens([TokenSequence([1] * 50, [2] * 37), TokenSequence([3], [4] * 10)])
    few, many = (kept_bytes(random_model(ModelConfig.from_hf_dict(shape), 0, dtype), batch) for shape in shapes)
    small, large = (ModelShape.of(shape) for shape in shapes)
    experts, width = large.num_expert_layers - small.num_expert_layers, dtype.itemsize
    predicted = experts * layer_bytes_per_token(large, width, experts=True)
    predicted += (2 - experts) * layer_bytes_per_token(large, width)
    offsets = 4 * experts * (large.experts.num_experts + 1)
    if large.latent or name == "mixtral":  # no norms of queries and keys
        assert many - few == pytest.approx(predicted * len(batch.input_ids), rel=0.03)
    else:
        assert many - few == predicted * len(batch.input_ids) + offsets


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [0, 4, 7, 8])
@pytest.mark.parametrize(("shape", "least"), [(QWEN3, 0.85), (EXPERTS, 0.75)], ids=["dense", "experts"])
def test_the_peak_of_a_forward_and_backward_is_predicted(shape, least, recomputed):
    model = random_model(ModelConfig.from_hf_dict(shape), 0, torch.bfloat16, "cuda")
    model.recomputed_layers = recomputed
    sequences = [TokenSequence([1] * 8000, [2] * 16), TokenSequence([3] * 200, [4])] * 2
    batch, num_tokens = pack_tokens(sequences, "cuda"), sum(s.num_input_tokens for s in sequences)

    def step():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (-token_scores(model, batch).logprobs.mean()).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    step()  # compiles the kernels, and leaves gradients that the next one adds to
    measured, predicted = step(), activation_bytes(ModelShape.of(shape), num_tokens, 2, recomputed=recomputed)
    sizes = f"{measured / 1e6:.1f} MB, predicted {predicted / 1e6:.1f} MB"
    report = f"{num_tokens} tokens, {recomputed} layers recomputed: {sizes}"
    sys.stderr.write(f"\n{report}\n")
    assert predicted * least < measured < predicted * 1.1, report
