"""The warp-specialised forward over packed sequences and over pages."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vexact.ops.kernels.attention.hopper.consumer import consume
from vexact.ops.kernels.attention.hopper.producer import produce
from vexact.ops.kernels.attention.hopper.shared import allocate


@gluon.jit(do_not_specialize=["num_rows", "num_sequences", "num_tiles", "stride_table", "skip_up_to"])
def forward_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, out, lse, cu_seqlens_q, kv_lengths, table, counter, run, c,
    num_rows, num_sequences, num_tiles, stride_table, skip_up_to,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, CHUNK: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PAD: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr,
    STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, RUN_SHARED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of all tiles of 128 query rows, drawn by as many programs as there are multiprocessors.

    q_desc, k_desc, v_desc: (rows, columns) of all heads, STEP columns from head to head, in boxes of 64 query rows and
    of `box_height` keys; q_rest_desc, k_rest_desc: the same for the columns past D_PAD, None where there are none;
    out (T, NUM_HEADS, DV) contiguous; lse (T, NUM_HEADS) fp32; counter (1,) int32, 0 at the start; run (programs, 2,
    64, DV) fp32, the merged chunks, None if RUN_SHARED. The others as in `attention/forward.py`.
    """
    shared = allocate(q_desc, k_desc, v_desc, BLOCK_N, TILE_N, D, DV, D_PAD, RUN_SHARED)
    gl.warp_specialize(
        [
            (
                consume,
                (shared, out, lse, run, c, 0, NUM_HEADS, BLOCK_N, TILE_N, CHUNK, D, DV, D_PAD, CAUSAL, RUN_SHARED),
            ),
            (
                consume,
                (shared, out, lse, run, c, 1, NUM_HEADS, BLOCK_N, TILE_N, CHUNK, D, DV, D_PAD, CAUSAL, RUN_SHARED),
            ),
            (
                produce,
                (
                    shared, q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, out, lse, cu_seqlens_q, kv_lengths, table,
                    counter, num_rows, num_sequences, num_tiles, stride_table, skip_up_to,
                    NUM_HEADS, GROUP, TILE_N, D, DV, D_PAD, PAGE_SIZE, CAUSAL, STEP_Q, STEP_K, STEP_V,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
