"""What attention needs to know about a batch besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.ops.attention.checks import check_counts, check_end_values, check_ends, check_table, readable


@dataclass(frozen=True, slots=True, eq=False)
class PackedMetadata:
    """B whole sequences laid end to end; queries and keys are the same T tokens.

    >>> PackedMetadata.from_lengths([3, 5]).cu_seqlens.tolist()
    [0, 3, 8]
    """

    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the lengths are not of this form; their values are looked at if they are on the CPU.
        """
        check_ends("cu_seqlens", self.cu_seqlens)
        if readable(self.cu_seqlens):
            check_end_values("cu_seqlens", self.cu_seqlens, longest=self.max_seqlen)

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> PackedMetadata:
        """Builds the metadata of sequences with these token counts."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(ends.to(device), max(lengths, default=0))


@dataclass(frozen=True, slots=True, eq=False)
class PagedMetadata:
    """B requests, each with some new query tokens and all its keys in pages.

    Page ``block_table[b, i]`` holds keys ``i*page_size ... (i+1)*page_size - 1`` of request b. Entries past the
    last page are -1 and never read.
    """

    cu_seqlens_q: Tensor  # (B+1,) int32
    seqused_k: Tensor  # (B,) int32, keys including those of the new tokens
    block_table: Tensor  # (B, P) int32
    slot_mapping: Tensor  # (T,) int64, page*page_size + offset where each new token's key goes; negative = skip
    max_seqlen_q: int
    max_seqlen_k: int

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: shapes or dtypes that do not fit together. Values are not looked at: those of a captured
                decode step come later.
        """
        check_ends("cu_seqlens_q", self.cu_seqlens_q)
        check_counts("seqused_k", self.seqused_k, self.cu_seqlens_q)
        check_table(self.block_table, self.cu_seqlens_q)
