"""How tiles come from the counter to the producer of a program, and from there to its consumers."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from vexact.ops.kernels.attention import rows
from vexact.ops.kernels.attention.hopper.shared import FIELDS, ROWS, advance

unowned_rows = gluon.jit(rows.unowned_rows.fn)


class Tile(NamedTuple):
    """A tile of 2 * ROWS rows of a sequence as the producer describes it."""

    start: tl.tensor  # of the sequence; negative where there are no more tiles
    length: tl.tensor
    other_length: tl.tensor  # of the rows on the other side of the scores
    first: tl.tensor  # row of the tile in the sequence
    head: tl.tensor


class Places(NamedTuple):
    """Where a producer is: the stage and phase of the ring that is walked, the slot and phase of the ring of
    descriptions, and the phases of the rows that consumers own and of its own barrier."""

    stage: tl.tensor
    phase: tl.tensor
    slot: tl.tensor
    work_phase: tl.tensor
    own_phase: tl.tensor
    tail_phase: tl.tensor


@gluon.jit
def produce_tiles(
    shared, clear_tile: gl.constexpr, cleared, produce_tile: gl.constexpr, arguments,
    cu_seqlens, counter, num_sequences, num_tiles, HEADS: gl.constexpr, LAST_FIRST: gl.constexpr,
):  # fmt: skip
    """Draw the tiles of 2 * ROWS rows of all heads until there are no more, the last ones of the batch first or not.

    Rows of no sequence: `clear_tile(first, head, *cleared)`. The others: `produce_tile(shared, tile, head, places,
    *arguments)`, which returns the next `Places`.
    """
    stage, phase = 0, 1
    slot, work_phase = 0, 1
    own_phase = 1
    tail_phase = 0
    item = gl.program_id(0)
    while item < num_tiles * HEADS:
        head = item % HEADS
        tile = item // HEADS
        if LAST_FIRST:
            tile = num_tiles - 1 - tile
        unowned = unowned_rows(cu_seqlens, num_sequences, tile, 2 * ROWS)
        if unowned >= 0:
            clear_tile(unowned, head, *cleared)
        else:
            places = Places(stage, phase, slot, work_phase, own_phase, tail_phase)
            stage, phase, slot, work_phase, own_phase, tail_phase = produce_tile(shared, tile, head, places, *arguments)
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
    describe(shared.work, shared.work_full, shared.work_empty, slot, work_phase, -1, 0, 0, 0, 0)


@gluon.jit
def describe(work, full, empty, slot, phase, start, length, other_length, first, head):
    """Hand the description of a tile to the consumers; a negative start says that there are no more."""
    lane = gl.arange(0, FIELDS, gl.BlockedLayout([FIELDS], [32], [1], [0]))
    value = gl.where(lane == 0, start, gl.where(lane == 1, length, gl.where(lane == 2, other_length, first)))
    mbarrier.wait(empty.index(slot), phase)
    work.index(slot).store(gl.where(lane == 4, head, value))
    mbarrier.arrive(full.index(slot), count=1)
    return advance(slot, phase, 2)


@gluon.jit
def read_field(description, index: gl.constexpr):
    lane = gl.arange(0, FIELDS, gl.BlockedLayout([FIELDS], [32], [4], [0]))
    return gl.sum(gl.where(lane == index, description, 0), 0)


@gluon.jit
def read_description(work, full, empty, slot, phase):
    """The arguments of `describe`, in the consumers."""
    mbarrier.wait(full.index(slot), phase)
    description = work.index(slot).load(gl.BlockedLayout([FIELDS], [32], [4], [0]))
    start = read_field(description, 0)
    length = read_field(description, 1)
    other_length = read_field(description, 2)
    first = read_field(description, 3)
    head = read_field(description, 4)
    mbarrier.arrive(empty.index(slot), count=1)
    return Tile(start, length, other_length, first, head)


@gluon.jit
def consume_tiles(shared, consume_tile: gl.constexpr, arguments):
    """Take all tiles that the producer describes, each by `consume_tile(shared, tile, stage, phase, own_phase, ...)`.

    It is given the place in the ring of the tiles that are walked and the phase of the one that is owned, then the
    arguments, and returns the next place and phase.
    """
    stage, phase = 0, 0
    slot, work_phase = 0, 0
    own_phase = 0
    more = True
    while more:
        tile = read_description(shared.work, shared.work_full, shared.work_empty, slot, work_phase)
        slot, work_phase = advance(slot, work_phase, 2)
        more = tile.start >= 0
        if more:
            stage, phase, own_phase = consume_tile(shared, tile, stage, phase, own_phase, *arguments)
