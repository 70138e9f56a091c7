"""`triton-invariant` inside Hugging Face models: same numbers as eager attention, and refusals instead of surprises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

from vexact.ops import hf

VOCABULARY = 97


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """One tiny Qwen3 with eager attention and one with ours, same weights."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    return eager_and_ours(config)


def eager_and_ours(config: Qwen3Config | DeepseekV3Config) -> tuple[nn.Module, nn.Module]:
    hf.register()
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=hf.NAME).eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer_inputs(batch: int, length: int, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, 4, length, 16, generator=generator)
    k, v = (torch.randn(batch, 2, keys or length, 16, generator=generator) for _ in range(2))
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: object) -> Tensor:
    out, weights = hf.attention_forward(nn.Identity(), q, k, v, mask, **kwargs)
    assert weights is None
    return out


def test_model_gives_the_logits_and_gradients_of_eager_attention(models: tuple[nn.Module, nn.Module]) -> None:
    compare(models)


@pytest.mark.parametrize("query_rank", [None, 20])
def test_latent_attention_gives_the_logits_and_gradients_of_eager_attention(query_rank: int | None) -> None:
    """Keys of 16 + 8 columns, values of 12."""
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=query_rank,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        max_position_embeddings=128,
    )
    compare(eager_and_ours(config))


def compare(models: tuple[nn.Module, nn.Module]) -> None:
    ids, gradients = tokens(3, 19), []
    for model in models:
        model.zero_grad()
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        logits.square().mean().backward()
        gradients.append([logits.detach(), *(p.grad for p in model.parameters())])
    for eager, ours in zip(*gradients):
        assert torch.allclose(eager, ours, rtol=1e-4, atol=1e-5)


def test_packed_positions_separate_the_sequences(models: tuple[nn.Module, nn.Module]) -> None:
    eager, ours = models
    pieces = [tokens(n) for n in (5, 1, 12)]
    packed = torch.cat(pieces)[None]
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])[None]
    with torch.no_grad():
        logits = ours(packed, position_ids=positions, use_cache=False).logits[0]
        expected = torch.cat([eager(piece[None]).logits[0] for piece in pieces])
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_gives_eager_tokens(models: tuple[nn.Module, nn.Module]) -> None:
    prompt = tokens(2, 7)
    outputs = [
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        for model in models
    ]
    assert torch.equal(*outputs)


def test_padding_and_static_caches_are_refused(models: tuple[nn.Module, nn.Module]) -> None:
    _, ours = models
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="padding"):
        ours(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="DynamicCache"):
        ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, cache_implementation="static")


def test_every_way_to_mark_sequences_gives_the_same_bits() -> None:
    q, k, v = layer_inputs(1, 18)
    lengths = [5, 1, 12]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, 5, 6, 18], dtype=torch.int32)
    from_positions = attend(q, k, v, position_ids=positions)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    assert torch.equal(from_positions, attend(q, k, v, **given))
    assert torch.equal(from_positions, attend(q, k, v, **given, max_length_q=12, max_length_k=torch.tensor(12)))
    alone = [attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 5), (5, 6), (6, 18))]
    assert torch.equal(from_positions, torch.cat(alone, dim=1))


def test_positions_changed_in_place_are_read_again() -> None:
    q, k, v = layer_inputs(1, 8)
    positions = torch.arange(8)[None]
    whole = attend(q, k, v, position_ids=positions)
    assert torch.equal(whole, attend(q, k, v, position_ids=positions))
    positions[0, 4:] -= 4
    halves = attend(q, k, v, position_ids=positions)
    assert not torch.equal(whole, halves)
    assert torch.equal(halves[:, 4:], attend(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:]))
    with torch.inference_mode():
        assert torch.equal(halves, attend(q, k, v, position_ids=positions.clone()))


def test_positions_need_not_start_at_zero_or_be_expanded() -> None:
    q, k, v = layer_inputs(2, 6)
    rows = attend(q, k, v)
    assert torch.equal(rows, attend(q, k, v, position_ids=torch.arange(6)[None]))
    assert torch.equal(rows, attend(q, k, v, position_ids=torch.arange(40, 46).expand(2, -1)))


def test_new_tokens_after_a_cache_see_all_keys() -> None:
    q, k, v = layer_inputs(2, 9)
    whole = attend(q, k, v)
    assert torch.equal(attend(q[:, :, 6:], k, v, position_ids=torch.arange(6, 9)[None]), whole[:, 6:])


def test_causality_follows_the_module_and_the_argument() -> None:
    q, k, v = layer_inputs(1, 7)
    both = attend(q, k, v, is_causal=False)
    assert not torch.allclose(both[:, 0], attend(q, k, v)[:, 0])
    module = nn.Identity()
    module.is_causal = False
    assert torch.equal(hf.attention_forward(module, q, k, v, None)[0], both)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(both, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mask": torch.zeros(1, 1, 8, 8)}, "attention_mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, "cu_seq_lens_k"),
        ({"position_ids": torch.zeros(3, 1, 8, dtype=torch.long)}, "position_ids"),
    ],
)
def test_what_is_not_supported_is_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        attend(*layer_inputs(1, 8), **arguments)


def test_a_window_longer_than_the_sequences_changes_nothing() -> None:
    q, k, v = layer_inputs(1, 8)
    assert torch.equal(attend(q, k, v, sliding_window=8), attend(q, k, v))


def test_custom_mask_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="pattern"):
        hf.attention_mask(kv_length=4, q_length=4, use_vmap=True)
    assert hf.attention_mask(kv_length=4, q_length=4, attention_mask=torch.ones(2, 4, dtype=torch.bool)) is None
