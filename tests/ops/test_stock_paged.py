"""FlashAttention-2 on pages: the adapters pass on what each signature means, and a faulty one is found out."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from vexact import attention
from vexact.models.opset import op_set, replayable
from vexact.ops import PagedMetadata, stock
from vexact.ops.stock import paged

CPU = torch.device("cpu")


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, used: Tensor, table: Tensor, scale: float, causal: bool
) -> Tensor:
    """What every paged FlashAttention computes; nothing is written to the pages."""
    lengths = cu_q.diff()
    nowhere = torch.full((int(lengths.sum()),), -1)
    longest = int(lengths.max()), int(used.max())
    metadata = PagedMetadata(cu_q, used, table, nowhere, *longest)
    new = k.new_zeros(len(q), *k.shape[2:])
    return stock.attention(q, new, new, metadata, scale, (k, v), causal)


class Installed:
    """Stand-ins with the signatures of the package and of torch, which note who was called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def decode(  # type: ignore[no-untyped-def]
        self, q, k_cache, v_cache, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False
    ) -> Tensor:
        self.called.append("decode")
        cu_q = torch.arange(len(q) + 1, dtype=torch.int32)
        out = attend(q.squeeze(1), k_cache, v_cache, cu_q, cache_seqlens, block_table, softmax_scale, causal)
        return out.unsqueeze(1)

    def varlen(  # type: ignore[no-untyped-def]
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False, block_table=None
    ) -> Tensor:
        self.called.append("varlen")
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        assert cu_k.dtype == torch.int32
        return attend(q, k, v, cu_q, cu_k.diff(), block_table, softmax_scale, causal)

    def torch_varlen(  # type: ignore[no-untyped-def]
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ) -> Tensor:  # fmt: skip
        self.called.append("torch")
        assert enable_gqa == (query.shape[1] != key.shape[2])
        assert num_splits == 1
        assert cu_seq_k.shape == cu_seq_q.shape
        return attend(query, key, value, cu_seq_q, seqused_k, block_table, scale, window_size == (-1, 0))


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "check_tensors", lambda *tensors: None)


def faults(reader: paged.Reader, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(paged, "reader", lambda: reader)
    return paged.fault(4, 2, 16, torch.float32, CPU)


def test_the_adapters_pass_on_what_each_signature_means(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Installed()
    for reader in (
        paged.adapt_package(installed.decode, installed.varlen),
        paged.adapt_torch(installed.torch_varlen),
    ):
        assert faults(reader, monkeypatch) == ""
    assert installed.called == ["decode", "varlen", "torch", "torch"]


def test_one_that_gives_wrong_rows_or_refuses_is_found_out(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged.adapt_torch(Installed().torch_varlen)

    def rows_left_out(*arguments: Any) -> Tensor:
        out = right(*arguments)
        out[1:] = float("nan")
        return out

    def other_page(q: Tensor, k: Tensor, v: Tensor, metadata: PagedMetadata, scale: float, causal: bool) -> Tensor:
        return right(q, k.roll(1, 0), v, metadata, scale, causal)

    def not_causal(q: Tensor, k: Tensor, v: Tensor, metadata: PagedMetadata, scale: float, causal: bool) -> Tensor:
        return right(q, k, v, metadata, scale, False)

    def refuses(*arguments: Any) -> Tensor:
        raise RuntimeError("block_table needs FlashAttention-3\nmore")

    for wrong in (rows_left_out, other_page, not_causal):
        assert "gives wrong numbers here" in faults(wrong, monkeypatch)
    assert faults(refuses, monkeypatch) == "paged FlashAttention fails here: block_table needs FlashAttention-3"


def test_pages_it_cannot_read_are_refused(on_the_cpu: None) -> None:
    metadata = paged._metadata([1], [3], CPU)
    q, cache = torch.zeros(1, 2, 16), torch.zeros(4, 64, 2, 16)
    with pytest.raises(ValueError, match="reads pages of a multiple of 256 tokens; page_size is 64"):
        paged.paged_flash_attention_2(q, q, q, metadata, 0.25, (cache, cache))
    with pytest.raises(ValueError, match="needs kv_cache"):
        paged.paged_flash_attention_2(q, q, q, metadata, 0.25)


def test_torch_here_has_block_tables_where_it_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.varlen import varlen_attn

    monkeypatch.setattr(attention, "_installed", lambda package: False)
    source, reason = attention.paged_flash_attention()
    needed = {"seqused_k", "block_table", "num_splits", "enable_gqa"}
    assert bool(source) != bool(reason)
    assert needed <= set(inspect.signature(varlen_attn).parameters) or "has no paged attention" in reason
    for version, has in (("2.11.0+cu130", False), ("2.12.1", False), ("2.13.0a0+git1", True), ("3.0.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert bool(attention.paged_flash_attention()[0]) == has
    monkeypatch.setattr(attention, "_installed", lambda package: package == "flash_attn.flash_attn_interface")
    assert attention.paged_flash_attention() == ("the package flash_attn", "")


def test_a_graph_may_hold_what_never_looks_at_the_host() -> None:
    from dataclasses import replace

    from vexact.ops.stock import moe

    products = {"grouped_linear": moe.grouped_product, "grouped_swiglu": moe.grouped_product_swiglu}
    ops = replace(op_set("stock"), **products)
    assert replayable(ops)
    assert replayable(replace(ops, attention=paged.paged_flash_attention_2))
    assert not replayable(replace(ops, attention=stock.attention))
    assert not replayable(op_set("stock"))  # one product per expert looks at their number of rows
    assert not replayable(op_set("stock", "flash_attention_2"))


@pytest.mark.gpu
def test_what_is_installed_reads_pages_or_says_why_not() -> None:
    source, reason = attention.paged_flash_attention()
    found = paged.fault(16, 8, 128, torch.bfloat16, torch.device("cuda"))
    assert (found == "") == bool(source), (source, reason, found)
