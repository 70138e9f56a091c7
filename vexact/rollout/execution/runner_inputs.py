"""One step's inputs on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vexact.ops.attention.metadata import PagedMetadata
from vexact.ops.sampling import SamplingTensors
from vexact.rollout.execution.decode_buckets import GraphKey


@dataclass(frozen=True, slots=True, eq=False)
class RunnerInputs:
    """T tokens of B sequences, S of which are sampled.

    With a ``graph`` the tensors are that graph's own, padded to its size, and only their first ``num_sampled`` rows
    are real.
    """

    input_ids: Tensor  # (T,) int64
    token_sources: Tensor  # (T,) int64, see Batch
    positions: Tensor  # (T,) int64
    attention: PagedMetadata
    sample_rows: Tensor | None  # (S,) int64; None: every row is sampled
    num_sampled: int
    sample_slots: Tensor  # (S,) int64
    sampling: SamplingTensors  # each (S,)
    graph: GraphKey | None = None

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        max_seqlen_q: int,
        max_seqlen_k: int,
        num_sampled: int,
        all_rows_sampled: bool,
        graph: GraphKey | None = None,
    ) -> RunnerInputs:
        """From tensors with the names, shapes and dtypes of ``Batch``."""
        attention = PagedMetadata(
            cu_seqlens_q=tensors["cu_seqlens_q"],
            seqused_k=tensors["seqused_k"],
            block_table=tensors["block_table"],
            slot_mapping=tensors["slot_mapping"],
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
        )
        sampling = SamplingTensors(
            temperature=tensors["temperature"],
            top_k=tensors["top_k"],
            top_p=tensors["top_p"],
            min_p=tensors["min_p"],
            seed=tensors["seed"],
            position=tensors["sample_positions"],
        )
        rows = None if all_rows_sampled else tensors["sample_rows"]
        return cls(
            input_ids=tensors["input_ids"],
            token_sources=tensors["token_sources"],
            positions=tensors["positions"],
            attention=attention,
            sample_rows=rows,
            num_sampled=num_sampled,
            sample_slots=tensors["sample_slots"],
            sampling=sampling,
            graph=graph,
        )
