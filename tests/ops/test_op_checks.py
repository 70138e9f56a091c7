"""What the operators refuse on the CPU, each by a ValueError that names the argument and the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vexact.ops import (
    PackedMetadata,
    PagedMetadata,
    add_rms_norm,
    attention,
    embedding,
    flash_attn_varlen_func,
    linear,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    rope,
    swiglu,
    token_logprobs,
    write_kv,
)
from vexact.ops.attention.reference import attention_reference

ZEROS = torch.zeros


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


def attend(**changed: Any) -> Any:
    """Two sequences of 2 and 4 tokens, 4 heads over 2, with some arguments changed."""
    q, k = ZEROS(6, 4, 16), ZEROS(6, 2, 16)
    given = {"q": q, "k": k, "v": k, "cu_seqlens_q": ints(0, 2, 6), "cu_seqlens_k": ints(0, 2, 6), "causal": True}
    return flash_attn_varlen_func(**given | changed)


def attend_paged(**changed: Any) -> Any:
    """The same over pages of 4 keys."""
    pages = ZEROS(5, 4, 2, 16)
    given = {
        "k": pages,
        "v": pages,
        "cu_seqlens_k": None,
        "seqused_k": ints(2, 7),
        "block_table": ints(0, 0, 1, 2).view(2, 2),
    }
    return attend(**given | changed)


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (attend, {"cu_seqlens_k": ints(0, 6)}, "cu_seqlens_q has 2 sequences but cu_seqlens_k has 1"),
        (attend, {"cu_seqlens_k": ints(0, 1, 2, 6)}, "cu_seqlens_q has 2 sequences but cu_seqlens_k has 3"),
        (attend, {"cu_seqlens_q": longs(0, 2, 6)}, "cu_seqlens_q is torch.int64"),
        (attend, {"cu_seqlens_q": ints(0, 2, 6).view(1, 3)}, r"cu_seqlens_q is torch.int32 \(1, 3\)"),
        (attend, {"cu_seqlens_q": ints(1, 2, 6)}, "cu_seqlens_q starts with 1"),
        (attend, {"cu_seqlens_q": ints(0, 0, 2, 0, 6, 0)[::2]}, "cu_seqlens_q has stride 2"),
        (attend, {"cu_seqlens_k": ints(0).expand(3)}, "cu_seqlens_k has stride 0"),
        (attend, {"cu_seqlens_k": ints(0, 5, 4)}, "cu_seqlens_k decreases: sequence 1 has -1 rows"),
        (attend, {"cu_seqlens_q": ints(0, 2, 7)}, "cu_seqlens_q ends with 7, but there are only 6 rows"),
        (attend, {"cu_seqlens_k": ints(0, 2, 9)}, "cu_seqlens_k ends with 9"),
        (attend, {"max_seqlen_q": 3}, "cu_seqlens_q holds a sequence of 4 rows, but its max_seqlen is 3"),
        (attend, {"max_seqlen_k": 1}, "cu_seqlens_k holds a sequence of 4 rows"),
        (attend, {"q": ZEROS(6, 3, 16)}, "3 query heads over 2 key heads"),
        (attend, {"q": ZEROS(6, 1, 16)}, "1 query heads over 2 key heads"),
        (attend, {"v": ZEROS(6, 4, 16)}, r"k \(6, 2, 16\), v \(6, 4, 16\)"),
        (attend, {"v": ZEROS(5, 2, 16)}, r"v \(5, 2, 16\)"),
        (attend, {"q": ZEROS(6, 4, 8)}, "head dims q 8, k 16"),
        (attend, {"q": ZEROS(6, 64)}, r"q \(6, 64\)"),
        (attend, {"q": ZEROS(6, 4, 264), "k": ZEROS(6, 2, 264), "v": ZEROS(6, 2, 264)}, "at most 256"),
        (attend, {"q": ZEROS(6, 4, 16, dtype=torch.float16)}, "must share fp32, bf16 or fp16"),
        (attend, {"v": ZEROS(6, 2, 16, dtype=torch.bfloat16)}, "must share"),
        (attend, {name: ZEROS(6, 2, 16).int() for name in "qkv"}, "torch.int32"),
        (attend, {"softmax_scale": float("nan")}, "softmax_scale is nan"),
        (attend, {"softmax_scale": -0.5}, "softmax_scale is -0.5"),
        (attend, {"softmax_scale": 0.0}, "softmax_scale is 0.0"),
        (attend, {"k": ZEROS(5, 4, 2, 16), "v": ZEROS(5, 4, 2, 16)}, "need a block_table"),
        (attend_paged, {"seqused_k": ints(2)}, r"seqused_k is torch.int32 \(1,\); cu_seqlens_q has 2 sequences"),
        (attend_paged, {"seqused_k": ints(2).expand(2)}, "seqused_k has stride 0"),
        (attend_paged, {"seqused_k": longs(2, 7)}, "seqused_k is torch.int64"),
        (attend_paged, {"seqused_k": ints(2, 9)}, r"seqused_k\[1\] is 9; a row of block_table holds 0 to 8 keys"),
        (attend_paged, {"seqused_k": ints(-1, 7)}, r"seqused_k\[0\] is -1"),
        (attend_paged, {"max_seqlen_k": 6}, r"seqused_k\[1\] is 7, but max_seqlen_k is 6"),
        (attend_paged, {"block_table": ints(0, 1)}, r"block_table is torch.int32 \(2,\)"),
        (attend_paged, {"block_table": ints(0, 1).view(1, 2)}, r"expected int32 \(2, pages\)"),
        (attend_paged, {"block_table": longs(0, 0, 1, 2).view(2, 2)}, "block_table is torch.int64"),
        (
            attend_paged,
            {"block_table": ints(0, 0, 1, 5).view(2, 2)},
            r"block_table\[1, 1\] is 5, but there are 5 pages",
        ),
        (attend_paged, {"block_table": ints(-1, 0, 1, 2).view(2, 2)}, r"block_table\[0, 0\] is -1"),
        (attend_paged, {"k": ZEROS(6, 2, 16), "v": ZEROS(6, 2, 16)}, "with a block_table it must be"),
        (attend_paged, {"seqused_k": None, "cu_seqlens_k": ints(0, 2, 1)}, "cu_seqlens_k decreases"),
    ],
)
def test_attention_names_what_does_not_fit(call: Callable[..., Any], changed: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_a_table_entry_that_is_not_used_may_be_anything() -> None:
    expected = attend_paged()
    assert torch.equal(attend_paged(block_table=ints(0, -7, 1, 2).view(2, 2)), expected)


def test_metadata_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="cu_seqlens decreases"):
        PackedMetadata(ints(0, 3, 2), 3)
    with pytest.raises(ValueError, match="its max_seqlen is 2"):
        PackedMetadata(ints(0, 3), 2)
    good = {
        "cu_seqlens_q": ints(0, 1),
        "seqused_k": ints(3),
        "block_table": ints(0).view(1, 1),
        "slot_mapping": longs(2),
        "max_seqlen_q": 1,
        "max_seqlen_k": 3,
    }
    for changed, message in (
        ({"seqused_k": ints(3, 3)}, "seqused_k is"),
        ({"cu_seqlens_q": longs(0, 1)}, "cu_seqlens_q is"),
        ({"cu_seqlens_q": ints(0, 1).view(1, 2)}, "cu_seqlens_q is"),
        ({"block_table": ints(0)}, "block_table is"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedMetadata(**good | changed)
    q, k, metadata = ZEROS(1, 2, 8), ZEROS(1, 1, 8), PagedMetadata(**good)
    cache = ZEROS(1, 4, 1, 8), ZEROS(1, 4, 1, 8)
    for pages, message in (
        ((cache[0].half(), cache[1]), "keys are"),
        ((cache[0], ZEROS(1, 4, 1, 9)), "values are"),
        ((cache[0], ZEROS(1, 4, 1, 16)[..., ::2]), "the cache of values has last stride 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, k, k, metadata, 1.0, pages)
    with pytest.raises(ValueError, match=r"slot_mapping holds 4, which is outside 0 \.\.\. 3"):
        write_kv(k, k, cache, longs(4))
    with pytest.raises(ValueError, match="2 queries, 1 keys, 1 values"):
        attention(ZEROS(2, 2, 8), k, k, PackedMetadata.from_lengths([1]), 1.0)
    with pytest.raises(ValueError, match="cu_seqlens ends with 2, but q has 1 rows"):
        attention(q, k, k, PackedMetadata.from_lengths([2]), 1.0)


TABLE = ZEROS(8, 16)
HEADS = ZEROS(3, 2, 16)
KEEP = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(ZEROS(2, 8), ZEROS(8)), r"weight is \(8,\), expected \(N, K\)"),
        (lambda: linear(ZEROS(2, 8).double(), ZEROS(4, 8).double()), "torch.float64; use fp32"),
        (lambda: linear(ZEROS(2, 8).int(), ZEROS(4, 8).int()), "torch.int32"),
        (lambda: linear(ZEROS(2, 8), ZEROS(4, 8), ZEROS(8)), r"bias is \(8,\), expected \(4,\)"),
        (lambda: embedding(longs(0, 8), TABLE), "ids holds 8, which is outside 0 ... 7"),
        (lambda: embedding(longs(-1), TABLE), "ids holds -1"),
        (lambda: embedding(ZEROS(2), TABLE), "ids are torch.float32"),
        (lambda: embedding(longs(0).view(1, 1), TABLE), r"ids is \(1, 1\)"),
        (
            lambda: token_logprobs(ZEROS(3, 5), longs(0, 1, 5), KEEP, KEEP),
            "token_ids holds 5, which is outside 0 ... 4",
        ),
        (lambda: token_logprobs(ZEROS(3, 5), longs(0, 1, -2), KEEP, KEEP), "token_ids holds -2"),
        (lambda: token_logprobs(ZEROS(3, 5), longs(0, 1), KEEP, KEEP), r"token_ids is \(2,\), expected \(3,\)"),
        (lambda: token_logprobs(ZEROS(3, 5), longs(0, 1, 2), KEEP.double(), KEEP), "inv_temperature is torch.float64"),
        (lambda: linear_cross_entropy(ZEROS(3, 8), ZEROS(5, 8), longs(0, 5, 1)), "token_ids holds 5"),
        (
            lambda: linear_cross_entropy(ZEROS(3, 8), ZEROS(5, 7), longs(0, 1, 2)),
            r"hidden has H=8 but weight is \(5, 7\)",
        ),
        (lambda: linear_cross_entropy(ZEROS(3, 8), ZEROS(5, 8).half(), longs(0, 1, 2)), "cast one of them"),
        (lambda: rope(HEADS, HEADS, longs(0, 1, 8), TABLE), "positions holds 8, which is outside 0 ... 7"),
        (lambda: rope(HEADS, HEADS, longs(0, 1, -1), TABLE), "positions holds -1"),
        (lambda: rope(HEADS, HEADS, longs(0, 1), TABLE), r"positions is \(2,\), expected \(3,\)"),
        (lambda: rope(HEADS, HEADS[:2], longs(0, 1, 2), TABLE), "q has 3 tokens but k has 2"),
        (lambda: rope(HEADS, HEADS, longs(0, 1, 2), TABLE[:, :8]), r"cos_sin \(8, 8\)"),
        (lambda: rope(HEADS[..., :5], HEADS[..., :5], longs(0, 1, 2), TABLE[:, :5]), "one even width"),
        (lambda: qk_norm_rope(HEADS, HEADS, KEEP, KEEP, 1e-6, longs(0, 1, 2), TABLE), "q_weight is"),
        (lambda: qk_norm_rope(HEADS, HEADS, TABLE[0], TABLE[0], 1e-6, longs(0, 1, 9), TABLE), "positions holds 9"),
        (lambda: swiglu(ZEROS(2, 7)), "width 7; it must be even"),
        (lambda: swiglu(ZEROS(2, 2, 8)), r"gate_up is \(2, 2, 8\)"),
        (lambda: rms_norm(ZEROS(2, 8), ZEROS(8).half(), 1e-6), "cast one of them"),
        (lambda: add_rms_norm(ZEROS(2, 8), ZEROS(3, 8), ZEROS(8), 1e-6), "residual is"),
        (lambda: add_rms_norm(ZEROS(2, 8), ZEROS(2, 8).half(), ZEROS(8), 1e-6), "cast one of them"),
    ],
)
def test_other_operators_name_what_does_not_fit(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_lens", "k_lens"), [([3, 0, 5], [9, 4, 70]), ([4, 6], [0, 2]), ([2], [2])])
def test_rows_of_no_sequence_are_zero_and_those_of_sequences_right(
    q_lens: list[int], k_lens: list[int], causal: bool
) -> None:
    """Zero-length sequences, more keys than queries and fewer; rows past the last sequence are full of NaN."""
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(q_lens), 4, 12), torch.randn(sum(k_lens), 2, 12), torch.randn(sum(k_lens), 2, 7)
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (q_lens, k_lens)]
    grown = [torch.cat((x, torch.full((5, *x.shape[1:]), float("nan")))).requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*grown, *ends, causal=causal, softmax_scale=0.3)
    assert isinstance(out, Tensor)
    assert not out[len(q) :].any()
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = attention_reference(*wide, *ends, 0.3, causal)
    torch.testing.assert_close(out[: len(q)].double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(expected.shape)
    gradients = torch.autograd.grad((out[: len(q)] * weight).sum(), grown)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * weight).sum(), wide), strict=True):
        torch.testing.assert_close(gradient[: len(right)].double(), right, rtol=1e-4, atol=1e-5)
        assert not gradient[len(right) :].any()
