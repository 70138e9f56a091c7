"""The warp-specialised forward over packed sequences."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vexact.ops.kernels.attention.hopper.consumer import consume
from vexact.ops.kernels.attention.hopper.producer import produce
from vexact.ops.kernels.attention.hopper.shared import allocate


@gluon.jit(do_not_specialize=["num_rows", "num_sequences", "num_tiles"])
def forward_kernel(
    q_desc, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k, counter, c, num_rows, num_sequences, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, CHUNK: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr,
    STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of all tiles of 128 query rows, drawn by as many programs as there are multiprocessors.

    q_desc, k_desc, v_desc: (rows, columns) of all heads, STEP columns from head to head, in boxes of 64 query rows and
    of TILE_N keys; out (T, NUM_HEADS, DV) contiguous; lse (T, NUM_HEADS) fp32; counter (1,) int32, 0 at the start.
    CHUNK 0: no sequence has more than one chunk.
    """
    shared = allocate(q_desc, k_desc, v_desc, BLOCK_N, TILE_N, D, DV)
    gl.warp_specialize(
        [
            (consume, (shared, out, lse, c, 0, NUM_HEADS, BLOCK_N, TILE_N, CHUNK, DV, CAUSAL)),
            (consume, (shared, out, lse, c, 1, NUM_HEADS, BLOCK_N, TILE_N, CHUNK, DV, CAUSAL)),
            (
                produce,
                (
                    shared, q_desc, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k, counter,
                    num_rows, num_sequences, num_tiles,
                    NUM_HEADS, GROUP, TILE_N, DV, CAUSAL, STEP_Q, STEP_K, STEP_V,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
