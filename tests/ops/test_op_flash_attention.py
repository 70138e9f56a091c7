"""flash_attn_varlen_func: FlashAttention's names and meanings; what is not supported is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vexact.ops.attention.flash import flash_attn_varlen_func
from vexact.ops.attention.reference import attention_reference

LENGTHS = [5, 0, 9]


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 16, generator=generator) for heads in (4, 2, 2))
    return q, k, v, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def paged(k: Tensor, v: Tensor, page_size: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(k_cache, v_cache, table, used) with the pages of the sequences in order."""
    counts = [-(-length // page_size) for length in LENGTHS]
    table = torch.full((len(LENGTHS), max(counts) + 1), -1, dtype=torch.int32)
    caches = [torch.zeros(sum(counts), page_size, 2, 16) for _ in range(2)]
    page = start = 0
    for row, (count, length) in enumerate(zip(counts, LENGTHS, strict=True)):
        for cache, rows in zip(caches, (k, v), strict=True):
            cache[page : page + count].flatten(0, 1)[:length] = rows[start : start + length]
        table[row, :count] = torch.arange(page, page + count)
        page, start = page + count, start + length
    return *caches, table, torch.tensor(LENGTHS, dtype=torch.int32)


@pytest.mark.parametrize("causal", [True, False])
def test_output_and_lse_layout(causal: bool) -> None:
    q, k, v, cu = inputs()
    out, lse = flash_attn_varlen_func(q, k, v, cu, cu, 9, 9, causal=causal, return_attn_probs=True)
    expected, expected_lse = attention_reference(q, k, v, cu, cu, 0.25, causal)
    assert torch.allclose(out.double(), expected, atol=1e-6)
    assert lse.shape == (4, 14)
    assert torch.allclose(lse.double(), expected_lse.T, atol=1e-6)


def test_arguments_may_be_left_out() -> None:
    q, k, v, cu = inputs()
    full = flash_attn_varlen_func(q, k, v, cu, cu, 9, 9, 0.0, 0.25, True, (-1, -1), 0.0, None, True)
    assert torch.equal(full, flash_attn_varlen_func(q, k, v, cu, cu, causal=True))
    scaled = flash_attn_varlen_func(q, k, v, cu, cu, softmax_scale=0.5, causal=True)
    assert not torch.equal(full, scaled)


def test_gradients_flow() -> None:
    q, k, v, cu = inputs()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    weight = torch.randn(14, 4, 16, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((flash_attn_varlen_func(q, k, v, cu, cu, 9, 9, causal=True) * weight).sum(), leaves)
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected, _ = attention_reference(*doubles, cu, cu, 0.25, True)
    for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), doubles), strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5)


def test_pages_by_any_of_their_names() -> None:
    q, k, v, cu = inputs()
    k_cache, v_cache, table, used = paged(k, v)
    packed, packed_lse = flash_attn_varlen_func(q, k, v, cu, cu, 9, 9, causal=True, return_softmax_lse=True)
    for names in (
        {"block_table": table, "seqused_k": used},
        {"page_table": table, "cache_seqlens": used},
        {"block_table": table, "cu_seqlens_k": cu},
    ):
        out, lse = flash_attn_varlen_func(q, k_cache, v_cache, cu, causal=True, return_softmax_lse=True, **names)
        assert torch.equal(out, packed)
        assert torch.equal(lse, packed_lse)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"window_size": (128, 0)}, "window_size"),
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
        ({"seqused_q": torch.ones(3)}, "seqused_q"),
        ({"seqused_k": torch.ones(3, dtype=torch.int32)}, "seqused_k"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(arguments: dict, name: str) -> None:
    q, k, v, cu = inputs()
    with pytest.raises(ValueError, match=name):
        flash_attn_varlen_func(q, k, v, cu, **{"cu_seqlens_k": cu} | arguments)


def test_paged_mistakes_are_refused() -> None:
    q, k, v, cu = inputs()
    k_cache, v_cache, table, used = paged(k, v)
    with pytest.raises(ValueError, match="block_table and page_table are the same"):
        flash_attn_varlen_func(q, k_cache, v_cache, cu, block_table=table, page_table=table, seqused_k=used)
    with pytest.raises(ValueError, match="needs seqused_k"):
        flash_attn_varlen_func(q, k_cache, v_cache, cu, block_table=table)
    with pytest.raises(ValueError, match="no backward"):
        flash_attn_varlen_func(q.requires_grad_(), k_cache, v_cache, cu, block_table=table, seqused_k=used)


def test_an_unknown_argument_is_an_error() -> None:
    q, k, v, cu = inputs()
    with pytest.raises(TypeError, match="q_descale"):
        flash_attn_varlen_func(q, k, v, cu, cu, q_descale=None)
