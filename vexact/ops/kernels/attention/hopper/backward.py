"""Host side of the warp-specialised backward."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.kernels.attention.descriptors import head_step
from vexact.ops.kernels.attention.hopper.backward_keys import keys_kernel
from vexact.ops.kernels.attention.hopper.backward_queries import queries_kernel
from vexact.ops.kernels.attention.hopper.forward import _descriptor as describe_rows
from vexact.ops.kernels.attention.hopper.shared import ROWS
from vexact.ops.kernels.attention.launch import exponent_scale, head_shape
from vexact.ops.kernels.linear.launch import multiprocessors

H = ROWS.value


def query_gradient(dout, q, k, v, delta, lse2, dq, cu_q, cu_k, softmax_scale, causal, BLOCK_N=64, STAGES=4, regs=(232, 40)):
    shape = head_shape(q, k, v)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    num_tiles = q.shape[0] // (2 * H) + cu_q.shape[0]
    queries_kernel[(min(multiprocessors(q.device), num_tiles * shape.num_heads),)](
        describe_rows(q, H), describe_rows(k, BLOCK_N), describe_rows(v, BLOCK_N), describe_rows(dout, H),
        lse2, delta, dq, cu_q, cu_k, counter, exponent_scale(softmax_scale), softmax_scale,
        q.shape[0], cu_q.shape[0] - 1, num_tiles,
        NUM_HEADS=shape.num_heads, GROUP=shape.group, BLOCK_N=BLOCK_N, D=shape.dim, DV=shape.value_dim, CAUSAL=causal,
        STEP_Q=head_step(q), STEP_K=head_step(k), STEP_V=head_step(v), STAGES=STAGES,
        CONSUMER_REGISTERS=regs[0], PRODUCER_REGISTERS=regs[1], num_warps=4,
    )  # fmt: skip


def key_gradients(dout, q, k, v, delta, lse2, dk, dv, cu_q, cu_k, softmax_scale, causal, STAGES=4, regs=(232, 40)):
    shape = head_shape(q, k, v)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    num_tiles = k.shape[0] // (2 * H) + cu_q.shape[0]
    keys_kernel[(min(multiprocessors(q.device), num_tiles * shape.num_kv_heads),)](
        describe_rows(q, H), describe_rows(k, H), describe_rows(v, H), describe_rows(dout, H),
        lse2, delta, dk, dv, cu_q, cu_k, counter, exponent_scale(softmax_scale), softmax_scale,
        q.shape[0], k.shape[0], cu_q.shape[0] - 1, num_tiles,
        KV_HEADS=shape.num_kv_heads, GROUP=shape.group, D=shape.dim, DV=shape.value_dim, CAUSAL=causal,
        STEP_Q=head_step(q), STEP_K=head_step(k), STEP_V=head_step(v), STAGES=STAGES,
        CONSUMER_REGISTERS=regs[0], PRODUCER_REGISTERS=regs[1], num_warps=4,
    )  # fmt: skip
