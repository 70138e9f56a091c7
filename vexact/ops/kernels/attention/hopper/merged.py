"""The merged chunks of a warp group, in shared memory where there is room, else in memory, and its finished rows.

Wide sums take part in this 128 columns at a time: a warp group has no registers for two sums of 64 x 256.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vexact.ops.kernels.attention.hopper.shared import ROWS
from vexact.ops.kernels.attention.hopper.stores import store_columns
from vexact.ops.kernels.attention.hopper.weights import accumulator, finish, halves, merge_states, row_sums


@gluon.constexpr_function
def part_width(columns):
    """Columns of a part of the sums."""
    return min(columns, 128)


@gluon.jit
def column_parts(acc, DV: gl.constexpr):
    """The sums in parts of `part_width` columns; no data moves."""
    if part_width(DV) == DV:
        parts = (acc,)
    else:
        parts = halves(acc, DV)
    return parts


@gluon.jit
def opaque(number):
    """The same number, of which the compiler knows nothing: what follows from it is not computed ahead of a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pointers_of_run(run, PART: gl.constexpr, INDEX: gl.constexpr, DV: gl.constexpr):
    """Where part PART of this program keeps its sums in memory; a thread reads what it has written itself.

    Addresses that were kept across the loop over keys would take more registers than there are.
    """
    WIDTH: gl.constexpr = part_width(DV)
    first = ((opaque(gl.program_id(0)) * 2 + PART) * (DV // WIDTH) + INDEX) * ROWS
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(WIDTH)))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, accumulator(WIDTH)))
    return run + (row * WIDTH)[:, None] + columns[None, :]


@gluon.jit
def store_run(
    shared, run, acc, PART: gl.constexpr, INDEX: gl.constexpr, DV: gl.constexpr, RUN_SHARED: gl.constexpr
):  # fmt: skip
    """Keep one part of the sums of the merged chunks."""
    if RUN_SHARED:
        shared.run.index(PART).store(acc)
    else:
        gl.store(pointers_of_run(run, PART, INDEX, DV), acc)


@gluon.jit
def clear_run(shared, run, PART: gl.constexpr, DV: gl.constexpr, RUN_SHARED: gl.constexpr):
    """Keep the sums of no chunk."""
    nothing = gl.zeros([ROWS, part_width(DV)], gl.float32, accumulator(part_width(DV)))
    for index in gl.static_range(DV // part_width(DV)):
        store_run(shared, run, nothing, PART, index, DV, RUN_SHARED)


@gluon.jit
def merge_part(
    shared, run, m_run, total_run, m, total, acc, c,
    PART: gl.constexpr, INDEX: gl.constexpr, DV: gl.constexpr, RUN_SHARED: gl.constexpr,
):  # fmt: skip
    """(m, total, acc) of one part of the merged chunks followed by the one that is at its end."""
    WIDTH: gl.constexpr = part_width(DV)
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(WIDTH))
    if RUN_SHARED:
        acc_run = shared.run.index(PART).load(accumulator(DV))
    else:
        acc_run = gl.load(pointers_of_run(run, PART, INDEX, DV))
    return merge_states(
        gl.convert_layout(m_run, layout, assert_trivial=True), total_run, acc_run,
        gl.convert_layout(m, layout, assert_trivial=True), row_sums(total, WIDTH), acc, c,
    )  # fmt: skip


@gluon.jit
def close_chunk(
    shared, run, m_run, total_run, m, total, acc, c, PART: gl.constexpr, DV: gl.constexpr, RUN_SHARED: gl.constexpr
):  # fmt: skip
    """Merge the sums of a chunk into those that are kept, and return what is not kept there: (m, total)."""
    parts = column_parts(acc, DV)
    for index in gl.static_range(DV // part_width(DV)):
        m_both, total_both, merged = merge_part(
            shared, run, m_run, total_run, m, total, parts[index], c, PART, index, DV, RUN_SHARED
        )
        store_run(shared, run, merged, PART, index, DV, RUN_SHARED)
    return m_both, total_both


@gluon.jit
def store_rows(
    out, lse, shared, value, row_lse, q_start, first, head, q_len,
    PART: gl.constexpr, INDEX: gl.constexpr, NUM_HEADS: gl.constexpr, DV: gl.constexpr, RUN_SHARED: gl.constexpr,
):  # fmt: skip
    """Write the rows that lie in the sequence to out (T, NUM_HEADS, DV), one part of them, and lse (T, NUM_HEADS)."""
    WIDTH: gl.constexpr = part_width(DV)
    if INDEX == 0:
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(WIDTH)))
        gl.store(lse + (q_start + row).to(gl.int64) * NUM_HEADS + head, row_lse, mask=row < q_len)
    if RUN_SHARED:
        dtype: gl.constexpr = out.dtype.element_ty
        staging = shared.run.index(PART)._reinterpret(dtype, [ROWS, DV], gl.NVMMASharedLayout(128, 16, rank=2))
        store_columns(out, staging, value, q_start, first, head, q_len, NUM_HEADS, DV, 0, DV)
    else:
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(WIDTH)))
        flat = ((q_start + row).to(gl.int64) * NUM_HEADS + head) * DV + INDEX * WIDTH
        columns = gl.arange(0, WIDTH, gl.SliceLayout(0, accumulator(WIDTH)))
        gl.store(out + flat[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=(row < q_len)[:, None])


@gluon.jit
def finish_rows(
    out, lse, shared, run, merged, m_run, total_run, m, total, acc, c, q_start, first, head, q_len,
    PART: gl.constexpr, NUM_HEADS: gl.constexpr, CHUNK: gl.constexpr, DV: gl.constexpr, RUN_SHARED: gl.constexpr,
):  # fmt: skip
    """Merge the last chunk, where any was `merged` before, divide and write rows."""
    WIDTH: gl.constexpr = part_width(DV)
    parts = column_parts(acc, DV)
    for index in gl.static_range(DV // WIDTH):
        m_last = gl.convert_layout(m, gl.SliceLayout(1, accumulator(WIDTH)), assert_trivial=True)
        total_last = row_sums(total, WIDTH)
        value = parts[index]
        if CHUNK > 0:  # noqa: SIM102 - a compile-time branch
            if merged:
                m_last, total_last, value = merge_part(
                    shared, run, m_run, total_run, m, total, value, c, PART, index, DV, RUN_SHARED
                )
        value, row_lse = finish(m_last, total_last, value, c)
        store_rows(
            out, lse, shared, value, row_lse, q_start, first, head, q_len, PART, index, NUM_HEADS, DV, RUN_SHARED
        )
