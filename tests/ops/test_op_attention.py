import pytest
import torch

from vexact.ops import PackedMetadata, PagedMetadata, attention
from vexact.ops.attention.packed import packed_attention
from vexact.ops.attention.reference import attention_reference

SCALE = 0.3
LATENT = {"heads": 4, "kv_heads": 4, "dim": 192, "value_dim": 128}


def _cu(lengths):
    return PackedMetadata.from_lengths(lengths).cu_seqlens


def _qkv(num_queries, num_keys, heads=4, kv_heads=2, dim=24, value_dim=None, dtype=torch.float32):
    shapes = (num_queries, heads, dim), (num_keys, kv_heads, dim), (num_keys, kv_heads, value_dim or dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _paged(k, v, lengths, page_size):
    """Keys and values scattered over shuffled pages; unused memory is NaN, unused table entries -1."""
    pages_per = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(pages_per) + 3)
    table = torch.full((len(lengths), max(pages_per) + 2), -1, dtype=torch.int32)
    caches = [torch.full((len(order), page_size, *t.shape[1:]), float("nan")).to(t.dtype) for t in (k, v)]
    start = used = 0
    for b, length in enumerate(lengths):
        pages = order[used : used + pages_per[b]]
        table[b, : len(pages)] = pages
        position = torch.arange(length)
        for cache, t in zip(caches, (k, v), strict=True):
            cache[pages[position // page_size], position % page_size] = t[start : start + length]
        start, used = start + length, used + pages_per[b]
    return table, caches


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dim", "value_dim", "heads", "kv_heads"), [(24, 24, 4, 2), (40, 16, 3, 1), (64, 64, 2, 2), (192, 128, 2, 2)]
)
def test_packed_forward_and_gradients_match_fp64(causal, dim, value_dim, heads, kv_heads):
    torch.manual_seed(0)
    lengths_q, lengths_k = [1, 17, 0, 70, 5], [9, 17, 4, 130, 2]  # shorter, equal, empty, longer and q_len > kv_len
    inputs = _qkv(sum(lengths_q), sum(lengths_k), heads, kv_heads, dim, value_dim)
    ours = [t.clone().requires_grad_() for t in inputs]
    wide = [t.double().requires_grad_() for t in inputs]
    cu_q, cu_k = _cu(lengths_q), _cu(lengths_k)
    out, lse = packed_attention(*ours, cu_q, cu_k, 70, 130, SCALE, causal)
    expected, expected_lse = attention_reference(*wide, cu_q, cu_k, SCALE, causal)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    if causal:
        blind = sum(lengths_q[:-1]) + torch.arange(3)  # 5 queries over 2 keys: the first 3 see nothing
        assert (out[blind] == 0).all()
        assert (lse[blind] == float("-inf")).all()
        expected = expected.nan_to_num()
    dout = torch.randn_like(out)
    out.backward(dout)
    seeing = lse.detach() > float("-inf")
    (expected * dout.double())[seeing].sum().backward()
    for a, b in zip(ours, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad.nan_to_num(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("page_size", "heads"),
    [(1, {}), (7, {}), (16, {}), (64, {}), (16, LATENT), (16, LATENT | {"dim": 24, "value_dim": 16})],
)
def test_every_path_gives_every_row_the_same_bits(dtype, page_size, heads):
    torch.manual_seed(page_size)
    lengths = [1, 63, 64, 65, 16, 15, 150]
    q, k, v = _qkv(sum(lengths), sum(lengths), dtype=dtype, **heads)
    packed = attention(q, k, v, PackedMetadata.from_lengths(lengths), SCALE)
    table, caches = _paged(k, v, lengths, page_size)
    starts = _cu(lengths)[:-1].tolist()

    def run(parts):
        """parts: (sequence, first query, end query) with keys up to the end query."""
        rows = torch.cat([torch.arange(starts[b] + i, starts[b] + j) for b, i, j in parts])
        sizes = [j - i for _, i, j in parts]
        metadata = PagedMetadata(
            cu_seqlens_q=_cu(sizes),
            seqused_k=torch.tensor([j for _, _, j in parts], dtype=torch.int32),
            block_table=table[[b for b, _, _ in parts]],
            slot_mapping=torch.full((len(rows),), -1),
            max_seqlen_q=max(sizes),
            max_seqlen_k=max(j for _, _, j in parts),
        )
        assert torch.equal(attention(q[rows], k[rows], v[rows], metadata, SCALE, tuple(caches)), packed[rows])

    everyone = range(len(lengths))
    run([(b, 0, lengths[b]) for b in everyone])  # prefill
    run([(b, lengths[b] - 1, lengths[b]) for b in everyone])  # decode batch
    run([(6, 0, 50), (3, 64, 65), (6, 50, 51), (6, 51, 150), (2, 10, 63)])  # chunks and decode mixed
    for position in range(lengths[6]):  # every position decoded alone
        run([(6, position, position + 1)])


def test_new_keys_are_written_before_they_are_read():
    torch.manual_seed(0)
    q, k, v = _qkv(5, 5)
    caches = (torch.zeros(3, 4, 2, 24), torch.zeros(3, 4, 2, 24))
    slots = torch.tensor([8, 9, 10, 11, 0])  # page 2, then page 0
    metadata = PagedMetadata(_cu([5]), _cu([5])[1:], torch.tensor([[2, 0]], dtype=torch.int32), slots, 5, 5)
    expected = attention(q, k, v, PackedMetadata.from_lengths([5]), SCALE)
    assert torch.equal(attention(q, k, v, metadata, SCALE, caches), expected)
    assert torch.equal(caches[0].flatten(0, 1)[slots], k)
    with pytest.raises(ValueError, match="kv_cache"):
        attention(q, k, v, metadata, SCALE)
