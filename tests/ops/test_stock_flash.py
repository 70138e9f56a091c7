"""flash_attention_2 and 3 run FlashAttention or say what is missing; on a GPU their numbers are right."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from vexact.attention import check_attention
from vexact.models.opset import STOCK_ATTENTION, op_set
from vexact.ops import PackedMetadata, PagedMetadata, stock
from vexact.ops.attention.reference import attention_reference
from vexact.ops.stock import flash

LENGTHS = [7, 1, 130, 64]
NAMES = ("flash_attention_2", "flash_attention_3")


def inputs(dim: int, heads: tuple[int, int], device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = heads[0], heads[1], heads[1]
    return [torch.randn(sum(LENGTHS), n, dim, generator=generator).to(device, dtype) for n in counts]


def paged(k: Tensor, v: Tensor, page_size: int = 16) -> tuple[PagedMetadata, tuple[Tensor, Tensor], Tensor]:
    """Every sequence but its last token in pages, in descending order; the last tokens are new. Also their rows."""
    counts = [-(-length // page_size) for length in LENGTHS]
    table = torch.full((len(LENGTHS), max(counts) + 1), -1, dtype=torch.int32)
    caches = tuple(torch.full((sum(counts), page_size, *x.shape[1:]), 9.0).to(x.device, x.dtype) for x in (k, v))
    ends, page, slots = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()], sum(counts), []
    for b, (start, end) in enumerate(pairwise(ends)):
        for place in range(counts[b]):
            page -= 1
            table[b, place] = page
            rows = slice(start + place * page_size, min(start + (place + 1) * page_size, end))
            for cache, x in zip(caches, (k, v), strict=True):
                cache[page, : rows.stop - rows.start] = x[rows]
        slots.append(page * page_size + (end - start - 1) % page_size)
    slot_mapping = torch.tensor(slots, device=k.device)
    for cache in caches:
        cache.flatten(0, 1)[slot_mapping] = 9.0
    metadata = PagedMetadata(
        cu_seqlens_q=torch.arange(len(LENGTHS) + 1, dtype=torch.int32, device=k.device),
        seqused_k=torch.tensor(LENGTHS, dtype=torch.int32, device=k.device),
        block_table=table.to(k.device),
        slot_mapping=slot_mapping,
        max_seqlen_q=1,
        max_seqlen_k=max(LENGTHS),
    )
    return metadata, (caches[0], caches[1]), torch.tensor(ends[1:], device=k.device) - 1


def test_each_name_has_its_own_function() -> None:
    assert len(set(STOCK_ATTENTION.values())) == len(STOCK_ATTENTION)
    assert op_set(attn_impl="sdpa").attention is stock.attention
    assert op_set(attn_impl="flash_attention_2").attention is flash.flash_attention_2
    assert op_set("stock", "flash_attention_3").attention is flash.flash_attention_3
    assert op_set("stock").attention is op_set().attention


@pytest.mark.parametrize("name", NAMES)
def test_on_the_cpu_it_says_so(name: str) -> None:
    q, k, v = inputs(16, (4, 2))
    with pytest.raises(ValueError, match=f"{name} runs on CUDA only, q is on cpu; use sdpa"):
        STOCK_ATTENTION[name](q, k, v, PackedMetadata.from_lengths(LENGTHS), 0.25)


@pytest.mark.parametrize(
    ("installed", "cuda", "name", "message"),
    [
        (
            (),
            True,
            "flash_attention_2",
            "needs the package flash_attn.flash_attn_interface or torch.nn.attention.varlen",
        ),
        ((), True, "flash_attention_3", "needs the package flash_attn_interface, which is not installed"),
        (("torch.nn.attention.varlen",), False, "flash_attention_2", "runs on CUDA GPUs, and torch finds none"),
        (("flash_attn_interface",), False, "flash_attention_3", "runs on CUDA GPUs"),
        (("flash_attn_interface",), True, "fa-invariant", "no adapter"),
        (("flash_attn.flash_attn_interface",), True, "flash_attention_2", None),
        (("torch.nn.attention.varlen",), True, "flash_attention_2", None),
        (("flash_attn_interface",), True, "flash_attention_3", None),
        ((), False, "sdpa", None),
    ],
)
def test_a_name_that_cannot_run_here_is_refused_at_the_start(
    installed: tuple[str, ...], cuda: bool, name: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vexact.attention._installed", lambda package: package in installed)
    monkeypatch.setattr("vexact.attention._has_cuda", lambda: cuda)
    if message is None:
        check_attention(name, "attn_impl")
        return
    with pytest.raises(ValueError, match=f"attn_impl={name}.* {message}"):
        check_attention(name, "attn_impl")


def test_without_its_package_flash_attention_3_is_not_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(flash, "import_module", absent)
    flash._varlen_3.cache_clear()
    with pytest.raises(ValueError, match=r"needs the package flash_attn_interface .*No module named"):
        flash._varlen_3()


def test_keys_of_pages_are_packed_in_the_order_of_the_sequences() -> None:
    _, k, v = inputs(8, (2, 2))
    metadata, caches, last = paged(k, v)
    flash.write_kv(k[last], v[last], caches, metadata.slot_mapping)
    keys, values, ends = flash.packed_keys(caches, metadata)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    assert ends.tolist() == PackedMetadata.from_lengths(LENGTHS).cu_seqlens.tolist()
    assert ends.dtype == torch.int32


def reference(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool) -> Tensor:
    return attention_reference(q, k, v, cu_q, cu_k, scale, causal)[0].to(q.dtype)


def test_the_adapters_pass_on_what_each_signature_means() -> None:
    """Stand-ins with the documented signatures compute with what they are given."""

    def package(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False):  # type: ignore[no-untyped-def]
        assert (max_q, max_k, dropout_p) == (130, 130, 0.0)
        return reference(q, k, v, cu_q, cu_k, softmax_scale, causal), "lse"

    def without_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        assert q.shape[1] == k.shape[1] == v.shape[1]
        return reference(q, k, v, cu_q, cu_k, scale, window_size == (-1, 0))

    def with_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return reference(q, k, v, cu_q, cu_k, scale, window_size == (-1, 0))

    cu = PackedMetadata.from_lengths(LENGTHS).cu_seqlens
    for heads in ((4, 2), (2, 2)):
        q, k, v = inputs(8, heads, dtype=torch.float32)
        for causal in (True, False):
            expected = reference(q, k, v, cu, cu, 0.3, causal)
            for varlen in (
                flash.adapt_package(package),
                flash.adapt_torch(without_groups),
                flash.adapt_torch(with_groups),
            ):
                assert torch.allclose(varlen(q, k, v, cu, cu, 130, 130, 0.3, causal), expected, atol=1e-6)


def test_torch_here_has_the_signature_the_adapter_expects() -> None:
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)


def runs_here(name: str) -> bool:
    try:
        check_attention(name, "attn_impl")
    except ValueError:
        return False
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 2)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_are_those_of_sdpa(name: str, heads: tuple[int, int], dim: int, causal: bool) -> None:
    """Or, where FlashAttention-3 is not installed, the refusal."""
    leaves = [x.requires_grad_() for x in inputs(dim, heads, "cuda")]
    metadata = PackedMetadata.from_lengths(LENGTHS, "cuda")
    if not runs_here(name):
        assert name == "flash_attention_3"
        with pytest.raises(ValueError, match="needs the package flash_attn_interface"):
            STOCK_ATTENTION[name](*leaves, metadata, dim**-0.5, None, causal)
        return
    weight = torch.randn(sum(LENGTHS), heads[0], dim, device="cuda", dtype=torch.bfloat16)
    results = []
    for attention in (STOCK_ATTENTION[name], stock.attention):
        out = attention(*leaves, metadata, dim**-0.5, None, causal)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, weight)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs.double()).norm() < 0.02 * theirs.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page_size", [16, 256])
def test_decoding_from_pages_is_the_last_row_of_the_packed_sequence(name: str, page_size: int) -> None:
    q, k, v = inputs(64, (8, 2), "cuda")
    metadata, caches, last = paged(k, v, page_size)
    attention = STOCK_ATTENTION[name]
    if not runs_here(name):
        assert name == "flash_attention_3"
        with pytest.raises(ValueError, match="needs the package flash_attn_interface"):
            attention(q[last], k[last], v[last], metadata, 0.125, caches)
        return
    packed = stock.attention(q, k, v, PackedMetadata.from_lengths(LENGTHS, "cuda"), 0.125)
    decoded = attention(q[last], k[last], v[last], metadata, 0.125, caches)
    assert (decoded.double() - packed[last].double()).norm() < 0.02 * packed[last].double().norm()


@pytest.mark.gpu
def test_fp32_is_refused_with_the_way_out() -> None:
    tensors = inputs(64, (4, 2), "cuda", torch.float32)
    with pytest.raises(ValueError, match=r"takes fp16 or bf16, q is torch.float32; compute in bfloat16"):
        flash.flash_attention_2(*tensors, PackedMetadata.from_lengths(LENGTHS, "cuda"), 0.125)
