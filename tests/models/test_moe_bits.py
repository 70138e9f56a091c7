"""A token's bits and routes are its own: packed with others, alone, or decoded from pages, chunk by chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_configs import DEEPSEEK_V2, FAMILIES

from vexact.models import ModelConfig, random_model
from vexact.models.layers import MoE
from vexact.models.opset import set_ops
from vexact.ops import PackedMetadata, PagedMetadata

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
LENGTHS = [9, 31, 1, 17]
PAGE = 4
CASES = [(family, torch.float32) for family in FAMILIES]
CASES += [(family, torch.bfloat16) for family in ("qwen3-moe", "mixtral", "moonlight", "deepseek-v2")]


def model_of(raw, dtype, ties=False):
    """Random, with a correction bias that matters; ``ties`` makes experts 2i and 2i + 1 score alike."""
    model = random_model(ModelConfig.from_hf_dict(raw), 0, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.layers:
            if not isinstance(layer.mlp, MoE):
                continue
            if layer.mlp.router.bias is not None:
                layer.mlp.router.bias.normal_(std=0.1, generator=generator)
            if ties:
                for parameter in layer.mlp.router.parameters():
                    parameter[1::2] = parameter[: len(parameter) // 2 * 2 : 2]
    return model


def prompts(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def packed(model, sequences):
    """Per sequence, hidden states and digests of one packed forward."""
    lengths = [len(ids) for ids in sequences]
    digest = torch.zeros(sum(lengths), dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model(torch.cat(sequences), positions, PackedMetadata.from_lengths(lengths), route_digest=digest)
    return list(zip(hidden.split(lengths), digest.split(lengths), strict=True))


@torch.no_grad()
def paged(model, sequences, chunks):
    """The same from pages that lie in a mixed order; step i brings every sequence ``chunks[i]`` tokens further."""
    config, (longest, count) = model.config, (max(map(len, sequences)), len(sequences))
    width = -(-longest // PAGE)
    table = torch.randperm(count * width, generator=torch.Generator().manual_seed(3)).view(count, width).int()
    shape, dtype = (count * width, PAGE, config.num_kv_heads), model.lm_head_weight.dtype
    widths = config.key_dim, config.value_dim
    caches = [tuple(torch.zeros(*shape, width, dtype=dtype) for width in widths) for _ in model.layers]
    done, found = [0] * count, [([], []) for _ in sequences]
    steps = iter(chunks)
    while any(have < len(ids) for have, ids in zip(done, sequences, strict=True)):
        step = next(steps)
        ends = [min(have + step, len(ids)) for have, ids in zip(done, sequences, strict=True)]
        places = [torch.arange(have, end) for have, end in zip(done, ends, strict=True)]
        new = [len(place) for place in places]
        slots = [row[place // PAGE].long() * PAGE + place % PAGE for row, place in zip(table, places, strict=True)]
        metadata = PagedMetadata(
            torch.tensor([0, *new]).cumsum(0).int(),
            torch.tensor(ends).int(),
            table,
            torch.cat(slots),
            max(new),
            longest,
        )
        digest = torch.zeros(sum(new), dtype=torch.int64)
        ids = torch.cat([s[place] for s, place in zip(sequences, places, strict=True)])
        hidden = model(ids, torch.cat(places), metadata, caches, route_digest=digest)
        for (states, digests), part, own in zip(found, hidden.split(new), digest.split(new), strict=True):
            states.append(part)
            digests.append(own)
        done = ends
    return [(torch.cat(states), torch.cat(digests)) for states, digests in found]


def assert_same(left, right):
    for (hidden, digest), (other, other_digest) in zip(left, right, strict=True):
        view = BITS[hidden.dtype]
        assert torch.equal(hidden.view(view), other.view(view))
        assert torch.equal(digest, other_digest)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_bits_and_routes_do_not_depend_on_company(family, dtype):
    model, sequences = model_of(FAMILIES[family], dtype), prompts()
    together = packed(model, sequences)
    assert_same(together, [packed(model, [ids])[0] for ids in sequences])
    assert_same(together[::-1], packed(model, sequences[::-1]))
    assert_same(together, paged(model, sequences, [5, 1, 1, 20, *[1] * 40]))
    digests = torch.cat([digest for _, digest in together])
    assert (len(digests.unique()) > 10) == (model.config.moe.top_k < model.config.moe.num_experts)  # there is a choice


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "deepseek-v2"])
def test_ties_are_broken_the_same_way(family):
    model, sequences = model_of(FAMILIES[family], torch.bfloat16, ties=True), prompts()
    together = packed(model, sequences)
    assert_same(together, [packed(model, [ids])[0] for ids in sequences])
    assert_same(together, paged(model, sequences, [23, *[1] * 40]))


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "moonlight", "deepseek-v2"])
def test_weights_are_rounded_where_the_reference_rounds_them(family):
    """Qwen3-MoE alone rounds them to the dtype of the model; all others multiply in fp32."""
    model, seen = model_of(FAMILIES[family], torch.bfloat16), []
    plain = model.ops.combine

    def combine(y, weights, *rest):
        seen.append(weights)
        return plain(y, weights, *rest)

    set_ops(model, replace(model.ops, combine=combine))
    packed(model, prompts())
    weights = torch.cat(seen)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, weights.bfloat16().float()) == (family == "qwen3-moe")


def test_a_prefix_keeps_its_bits():
    """Nothing of a token depends on later ones, so a digest of a prefix is the prefix of the digest."""
    model, sequences = model_of(FAMILIES["moonlight"], torch.bfloat16), prompts()
    whole = packed(model, sequences)
    assert_same([(h[:1], d[:1]) for h, d in whole], packed(model, [ids[:1] for ids in sequences]))


def test_a_digest_tells_layers_and_experts_apart():
    model, sequences = model_of(FAMILIES["moonlight"], torch.float32), prompts()
    before = [digest for _, digest in packed(model, sequences)]
    with torch.no_grad():
        model.layers[2].mlp.router.bias[5] += 100.0  # chosen by every token now, in the last layer alone
    after = [digest for _, digest in packed(model, sequences)]
    changed = torch.cat([a != b for a, b in zip(before, after, strict=True)])
    assert changed.any()
    assert not changed.all()


def test_a_digest_tells_layers_apart():
    """Where every token chooses all experts, each layer still says something else."""
    raw = FAMILIES["qwen3-moe-all"]
    one, three = (packed(model_of(raw | {"num_hidden_layers": n}, torch.float32), prompts()) for n in (1, 3))
    assert (one[0][1] == one[0][1][0]).all()
    assert (three[0][1] != 3 * one[0][1]).all()


def backward(model, recomputed, **forward):
    model.recomputed_layers = recomputed
    model.zero_grad()
    ids, lengths = torch.cat(prompts()), LENGTHS
    positions = torch.cat([torch.arange(length) for length in lengths])
    model.logits(model(ids, positions, PackedMetadata.from_lengths(lengths), **forward)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3"])
def test_recomputation_changes_no_bit_and_no_digest(family):
    model = model_of(FAMILIES[family], torch.float32)
    digests, gradients = [], []
    for recomputed in (0, 1, len(model.layers)):
        digest = torch.zeros(sum(LENGTHS), dtype=torch.int64)
        gradients.append(backward(model, recomputed, route_digest=digest))
        digests.append(digest)
    assert all(digest.equal(digests[0]) for digest in digests)
    assert torch.cat([digest for _, digest in packed(model, prompts())]).equal(digests[0])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for found in gradients:
        assert found.keys() == trained
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, found[name]), name
            assert gradient.count_nonzero() > 0, name


def test_gradients_are_those_of_torch():
    """Of the model on torch's own operators, to fp32 rounding: routes are equal, since no token is near a tie."""
    model = model_of(FAMILIES["deepseek-v3"], torch.float32)
    stock = random_model(model.config, 0, ops="stock")
    stock.load_state_dict(model.state_dict())
    ours, theirs = backward(model, 0), backward(stock, 0)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        atol = 1e-4 * theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=atol)


def test_an_expert_that_nobody_chose_gets_zeros():
    raw = DEEPSEEK_V2 | {"num_experts_per_tok": 1}
    model = model_of(raw, torch.float32)
    with torch.no_grad():
        model.layers[1].mlp.router.weight[3] = model.layers[1].mlp.router.weight[2]  # the lower index always wins
    gradients = backward(model, 0)
    for part in ("gate_up_proj", "down_proj"):
        gradient = gradients[f"layers.1.mlp.experts.{part}"]
        assert gradient[3].count_nonzero() == 0
        assert gradient[2].count_nonzero() > 0
