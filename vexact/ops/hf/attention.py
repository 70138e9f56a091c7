"""The attention that transformers calls as ``triton-invariant``; CPU tensors run the CPU twin."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vexact.ops.attention.packed import packed_attention

NAME = "triton-invariant"

_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "cache", "block_table")


class Sequences(NamedTuple):
    """Where the sequences of a flattened batch begin and end: cumulative lengths (B+1,) int32 and the longest ones."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def attention_mask(
    *,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> None:
    """The mask transformers hands to :func:`attention_forward`: always none, because the kernels build their own.

    A two-dimensional mask is read once per forward (a device synchronisation); leave it out of packed batches.

    Raises:
        ValueError: the batch has padding, the cache has slots that are not tokens, or the model changes the pattern.
    """
    if use_vmap:
        raise ValueError(f"{NAME}: the model adds its own mask pattern; only causal and full attention are supported")
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor) or kv_offset != 0:
        raise ValueError(f"{NAME}: static and sliding-window caches are not supported; use a DynamicCache")
    if q_length is not None and kv_length != q_offset + q_length:
        raise ValueError(
            f"{NAME}: {kv_length} keys for {q_offset} cached and {q_length} new tokens; use a DynamicCache, "
            "which holds tokens only"
        )
    if attention_mask is not None and not (attention_mask.shape[-1] == kv_length and bool(attention_mask.all())):
        raise ValueError(
            f"{NAME}: the attention mask has padding; pack the sequences into one row with position_ids that restart "
            "at every sequence, or batch sequences of equal length"
        )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: (B, Hq, T, D). key: (B, Hkv, Tk, D). value: (B, Hkv, Tk, Dv). Tk > T with a key cache.
        kwargs: ``cu_seq_lens_q/k`` (with ``max_length_q/k``) or ``position_ids`` mark packed sequences.

    Returns:
        (B, T, Hq, Dv) in the dtype of ``query``, and None for the attention weights, which never exist.

    Raises:
        ValueError: a mask, dropout, a window shorter than the sequences, or another unsupported argument.
    """
    _refuse_unsupported(attention_mask, dropout, kwargs)
    batch, num_heads, q_length, head_dim = query.shape
    sequences = find_sequences(batch, q_length, key.shape[2], query.device, kwargs)
    if sliding_window is not None and sequences.max_seqlen_k > sliding_window:
        raise ValueError(
            f"{NAME}: sliding_window={sliding_window} is shorter than a sequence of {sequences.max_seqlen_k} keys; "
            "sliding-window attention is not supported"
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = head_dim**-0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out, _ = packed_attention(q, k, v, *sequences, scale, causal)
    return out.view(batch, q_length, num_heads, value.shape[-1]), None


def find_sequences(batch: int, q_length: int, k_length: int, device: torch.device, kwargs: dict[str, Any]) -> Sequences:
    """The sequences of a batch (B, T), from ``cu_seq_lens_*``, else from restarting ``position_ids``, else its rows.

    Reading lengths from tensors synchronises with the device, once per forward and not per layer; pass
    ``cu_seq_lens_*`` with integer ``max_length_*`` to avoid it.
    """
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if (cu_q is None) != (cu_k is None):
        raise ValueError(f"{NAME}: pass both cu_seq_lens_q and cu_seq_lens_k, or neither")
    if cu_q is not None and cu_k is not None:
        return _given(cu_q, cu_k, kwargs.get("max_length_q"), kwargs.get("max_length_k"), device)
    position_ids = kwargs.get("position_ids")
    if q_length != k_length or position_ids is None:
        return Sequences(_rows(batch, q_length, device), _rows(batch, k_length, device), q_length, k_length)
    if position_ids.dim() != 2:
        raise ValueError(f"{NAME}: position_ids of shape {tuple(position_ids.shape)}; expected (batch, tokens)")
    return _from_positions(position_ids, batch, device)


def _refuse_unsupported(attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ValueError(f"{NAME}: attention_mask of shape {tuple(attention_mask.shape)} is not supported; pass none")
    if dropout:
        raise ValueError(f"{NAME}: attention dropout {dropout} is not supported; set attention_dropout=0")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME}: {name} is not supported")


def _rows(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _given(cu_q: Tensor, cu_k: Tensor, max_q: Any, max_k: Any, device: torch.device) -> Sequences:
    longest = [int(cu.diff().max()) if given is None else int(given) for cu, given in ((cu_q, max_q), (cu_k, max_k))]
    cu_q, cu_k = (cu.to(device=device, dtype=torch.int32) for cu in (cu_q, cu_k))
    return Sequences(cu_q, cu_k, *longest)


class _LastPositions:
    """The sequences found in the last ``position_ids``: every layer of a forward asks about the same tensor."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._key: tuple[int, int, torch.device] | None = None
        self._sequences: Sequences | None = None

    def find(self, position_ids: Tensor, key: tuple[int, int, torch.device]) -> Sequences | None:
        same = self._tensor is not None and self._tensor() is position_ids and self._key == key
        return self._sequences if same else None

    def remember(self, position_ids: Tensor, key: tuple[int, int, torch.device], sequences: Sequences) -> None:
        self._tensor, self._key, self._sequences = weakref.ref(position_ids), key, sequences


_last_positions = _LastPositions()


def _from_positions(position_ids: Tensor, batch: int, device: torch.device) -> Sequences:
    """A sequence starts at the first token of a row and wherever a position is not its predecessor plus one."""
    # In-place changes move the version; inference tensors have none and are looked at every time.
    key = None if position_ids.is_inference() else (position_ids._version, batch, device)
    known = _last_positions.find(position_ids, key) if key else None
    if known is not None:
        return known
    rows = position_ids.to(device).expand(batch, -1)
    starts = torch.ones(rows.shape, dtype=torch.bool, device=device)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
    begin = starts.flatten().nonzero().squeeze(1)
    end = begin.new_tensor([rows.numel()])
    cu_seqlens = torch.cat((begin, end)).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    sequences = Sequences(cu_seqlens, cu_seqlens, longest, longest)
    if key:
        _last_positions.remember(position_ids, key, sequences)
    return sequences
