"""Turns a schedule into the arrays of one forward pass, by numpy indexing only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vexact.rollout.scheduling.scheduler import Schedule
from vexact.rollout.scheduling.state import SlotState


@dataclass(frozen=True, slots=True)
class Batch:
    """Host side of one step: T packed tokens of B sequences, S of which are sampled.

    Example: a decode at position 9 and the last 3 tokens of a 5-token prompt give T=4, B=2, S=2,
    ``positions=[9, 2, 3, 4]``, ``cu_seqlens_q=[0, 1, 4]``, ``seqused_k=[10, 5]``, ``sample_rows=[0, 3]``.
    """

    input_ids: np.ndarray  # (T,) int64, 0 where the device alone knows the token
    token_sources: np.ndarray  # (T,) int64, there the slot that sampled it; elsewhere the number of slots
    positions: np.ndarray  # (T,) int64
    slot_mapping: np.ndarray  # (T,) int64, page * page_size + offset
    cu_seqlens_q: np.ndarray  # (B + 1,) int32
    seqused_k: np.ndarray  # (B,) int32
    block_table: np.ndarray  # (B, P) int32, -1 padded, P = most pages of any sequence here
    max_seqlen_q: int
    max_seqlen_k: int
    sample_slots: np.ndarray  # (S,) int64, where the results go
    sample_rows: np.ndarray  # (S,) int64, rows of T whose next token is sampled
    temperature: np.ndarray  # (S,) float32
    top_k: np.ndarray  # (S,) int32
    top_p: np.ndarray  # (S,) float32
    min_p: np.ndarray  # (S,) float32
    seed: np.ndarray  # (S,) int64
    sample_positions: np.ndarray  # (S,) int64, index of the new token in its whole sequence

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def all_rows_sampled(self) -> bool:
        return len(self.sample_rows) == self.num_tokens


def build_batch(state: SlotState, schedule: Schedule) -> Batch:
    """Arrays of the step that computes ``schedule.num_new`` further tokens of each of ``schedule.slots``."""
    slots, num_new = schedule
    start = state.num_computed[slots]
    stop = start + num_new
    ends = np.cumsum(num_new)
    cu_seqlens_q = np.zeros(len(slots) + 1, np.int32)
    cu_seqlens_q[1:] = ends
    if int(ends[-1]) == len(slots):
        token_slots, positions = slots, start
    else:
        token_slots = np.repeat(slots, num_new)
        positions = np.arange(ends[-1]) + np.repeat(start - (ends - num_new), num_new)
    page_index, offset = np.divmod(positions, state.page_size)
    pages = state.block_table[token_slots, page_index].astype(np.int64)
    input_ids = state.token_ids[token_slots, positions]
    token_sources = np.full(len(input_ids), len(state.requests))
    pending = state.num_pending[slots] > 0  # then its only new token is the one on its way
    if pending.any():
        rows = ends[pending] - 1
        input_ids[rows] = 0
        token_sources[rows] = slots[pending]
    complete = stop == state.num_tokens[slots]
    sample_slots = slots[complete]
    return Batch(
        input_ids=input_ids,
        token_sources=token_sources,
        positions=positions,
        slot_mapping=pages * state.page_size + offset,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=stop.astype(np.int32),
        block_table=state.block_table[slots, : int(state.num_pages[slots].max())],
        max_seqlen_q=int(num_new.max()),
        max_seqlen_k=int(stop.max()),
        sample_slots=sample_slots,
        sample_rows=ends[complete] - 1,
        temperature=state.temperature[sample_slots],
        top_k=state.top_k[sample_slots],
        top_p=state.top_p[sample_slots],
        min_p=state.min_p[sample_slots],
        seed=state.seed[sample_slots],
        sample_positions=state.num_tokens[sample_slots],
    )
