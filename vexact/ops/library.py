"""The launches of the operators as custom operators of ``torch.library``, for ``torch.compile`` and ``torch.export``.

While a graph is captured, :func:`vexact.ops.dispatch.backend` hands these out in place of the kernels: each is one
opaque node, so that no compiler fuses, reorders or splits what decides the bits, and the nodes know their result from
shapes alone, so that another batch size does not compile again. Gradients stay where they are, in the autograd
functions around the launches. Registration happens on import, and nothing imports this module before it is needed.
"""

# Annotations are read by torch.library, which does not resolve those that are text: no `from __future__` here.

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from vexact.ops.dispatch import module


def _opaque(fake: Callable[..., Any], *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers a launch under its own name; ``fake`` gives empty results of the right shape, dtype and strides."""

    def register(launch: Callable[..., Any]) -> CustomOpDef:
        op = custom_op(f"vexact::{launch.__name__}", launch, mutates_args=mutates)
        op.register_fake(fake)
        return op

    return register


def _same(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors like these."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _rows(tensor: Tensor, *width: int) -> Tensor:
    """fp32 with as many rows as ``tensor``."""
    return tensor.new_empty((tensor.shape[0], *width), dtype=torch.float32)


@_opaque(lambda x, weight, bias, out_dtype: x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype))
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return module("linear", x).forward(x, weight, bias, out_dtype)


@_opaque(lambda dy, weight: dy.new_empty((dy.shape[0], weight.shape[1])))
def linear_grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    return module("linear", dy).grad_input(dy, weight)


@_opaque(lambda dy, x: x.new_empty((dy.shape[1], x.shape[1])))
def linear_grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    return module("linear", dy).grad_weight(dy, x)


@_opaque(lambda dy: dy.new_empty((dy.shape[1],)))
def linear_grad_bias(dy: Tensor) -> Tensor:
    return module("linear", dy).grad_bias(dy)


@_opaque(lambda x, weight: x.new_empty((x.shape[0], weight.shape[0] // 2)))
def linear_swiglu_forward(x: Tensor, weight: Tensor) -> Tensor:
    return module("linear_swiglu", x).forward(x, weight)


@_opaque(lambda x, weight, eps: (*_same(x), _rows(x)))
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return module("rms_norm", x).forward(x, weight, eps)


@_opaque(lambda x, residual, weight, eps: (*_same(x, x), _rows(x)))
def rms_norm_add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return module("rms_norm", x).add_forward(x, residual, weight, eps)


@_opaque(lambda dy, x, weight, rstd: _same(x, weight))
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return module("rms_norm", dy).backward(dy, x, weight, rstd)


@_opaque(lambda q, k, *others: (*_same(q, k), _rows(q, q.shape[1]), _rows(k, k.shape[1])))
def qk_norm_rope_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return module("rotary.qk_norm_rope", q).forward(q, k, q_weight, k_weight, eps, positions, cos_sin)


@_opaque(lambda q, k, positions, cos_sin, inverse: _same(q, k))
def rope_forward(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return module("rotary.rope", q).forward(q, k, positions, cos_sin, inverse)


@_opaque(lambda q, *others: _same(q)[0], mutates=("k_cache", "v_cache"))
def rope_to_cache_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    cache = k_cache, v_cache, slot_mapping
    return module("rotary.rope_to_cache", q).forward(q, k, v, q_weight, k_weight, eps, positions, cos_sin, *cache)


@_opaque(lambda q, *others: _same(q, q))
def latent_rope_forward(
    q: Tensor, k_plain: Tensor, k_rotated: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return module("rotary.latent_rope", q).forward(q, k_plain, k_rotated, positions, cos_sin, interleaved)


@_opaque(lambda gate_up: gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2)))
def swiglu_forward(gate_up: Tensor) -> Tensor:
    return module("swiglu", gate_up).forward(gate_up)


@_opaque(lambda dy, gate_up: _same(gate_up)[0])
def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    return module("swiglu", dy).backward(dy, gate_up)


@_opaque(lambda ids, weight: weight.new_empty((ids.shape[0], weight.shape[1])))
def embedding_forward(ids: Tensor, weight: Tensor) -> Tensor:
    return module("embedding", weight).forward(ids, weight)


@_opaque(lambda dy, ids, num_rows: dy.new_empty((num_rows, dy.shape[1])))
def embedding_backward(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    return module("embedding", dy).backward(dy, ids, num_rows)


def _attention_out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], v.shape[-1])), _rows(q, q.shape[1])


@_opaque(lambda q, k, v, *lengths_scale_causal: _attention_out(q, v))
def attention_packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return module("attention", q).packed_forward(q, k, v, *lengths, scale, causal)


@_opaque(lambda dout, q, k, v, *others: _same(q, k, v))
def attention_packed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return module("attention", q).packed_backward(dout, q, k, v, out, lse, *lengths, scale, causal)


@_opaque(lambda q, k_cache, v_cache, *others: _attention_out(q, v_cache))
def attention_paged_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    lengths = cu_seqlens_q, seqused_k, block_table, max_seqlen_q, max_seqlen_k
    return module("attention", q).paged_forward(q, k_cache, v_cache, *lengths, scale, causal)


@_opaque(lambda *tensors: None, mutates=("k_cache", "v_cache"))
def attention_write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    module("attention", k).write_kv(k, v, k_cache, v_cache, slot_mapping)


@_opaque(lambda hidden, *others: (_rows(hidden), _rows(hidden), _rows(hidden)))
def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    op = module("linear_cross_entropy", hidden)
    return op.forward(hidden, weight, targets, inv_temperature, min_logit)


@_opaque(lambda dlogprobs, dentropy, hidden, weight, *others: _same(hidden, weight))
def linear_cross_entropy_backward(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    lse: Tensor,
    entropy: Tensor,
) -> tuple[Tensor, Tensor]:
    rows = targets, inv_temperature, min_logit, lse, entropy
    return module("linear_cross_entropy", hidden).backward(dlogprobs, dentropy, hidden, weight, *rows)


def _weights_like(experts: Tensor) -> Tensor:
    return experts.new_empty(experts.shape, dtype=torch.float32)


def _routes(logits: Tensor, bias: Tensor | None, digest: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    experts = logits.new_empty((logits.shape[0], top_k), dtype=torch.int32)
    return experts, _weights_like(experts)


@_opaque(_routes, mutates=("digest",))
def moe_router_forward(
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
) -> tuple[Tensor, Tensor]:
    choice = top_k, scoring, num_groups, top_groups
    return module("moe.router", logits).forward(logits, bias, digest, *choice, normalize, scale, round_to, salt)


def _groups(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        experts.new_empty((experts.numel(),)),
        experts.new_empty(experts.shape),
        experts.new_empty((num_experts + 1,)),
    )


def _grouped_routes(
    logits: Tensor, bias: Tensor | None, digest: Tensor | None, padding: Tensor | None, top_k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    experts, weights = _routes(logits, bias, digest, top_k)
    return experts, weights, *_groups(experts, logits.shape[1])


@_opaque(_grouped_routes, mutates=("digest",))
def moe_router_grouped_forward(
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    padding: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    choice = top_k, scoring, num_groups, top_groups, normalize, scale, round_to, salt
    return module("moe.router", logits).grouped_forward(logits, bias, digest, padding, *choice)


@_opaque(lambda dweights, logits, *others: _same(logits)[0])
def moe_router_backward(
    dweights: Tensor, logits: Tensor, experts: Tensor, top_k: int, scoring: str, normalize: bool, scale: float
) -> Tensor:
    return module("moe.router", logits).backward(dweights, logits, experts, top_k, scoring, normalize, scale)


@_opaque(_groups)
def moe_groups_forward(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return module("moe.groups", experts).forward(experts, num_experts)


@_opaque(lambda x, weight, rows, offsets, top_k: x.new_empty(((x if rows is None else rows).shape[0], weight.shape[1])))
def moe_grouped_linear_forward(x: Tensor, weight: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int) -> Tensor:
    return module("moe.grouped_linear", x).forward(x, weight, rows, offsets, top_k)


@_opaque(
    lambda x, weight, rows, offsets, top_k: x.new_empty(((x if rows is None else rows).shape[0], weight.shape[1] // 2))
)
def moe_grouped_linear_swiglu_forward(
    x: Tensor, weight: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int
) -> Tensor:
    return module("moe.grouped_linear", x).swiglu_forward(x, weight, rows, offsets, top_k)


@_opaque(lambda dy, weight, offsets: dy.new_empty((dy.shape[0], weight.shape[2])))
def moe_grouped_linear_grad_input(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return module("moe.grouped_linear", dy).grad_input(dy, weight, offsets)


@_opaque(
    lambda dy, x, rows, offsets, top_k: x.new_empty((offsets.shape[0] - 1, dy.shape[1], x.shape[1])),
)
def moe_grouped_linear_grad_weight(dy: Tensor, x: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int) -> Tensor:
    return module("moe.grouped_linear", dy).grad_weight(dy, x, rows, offsets, top_k)


@_opaque(lambda y, weights, slots, shared: y.new_empty((slots.shape[0], y.shape[1])))
def moe_combine_forward(y: Tensor, weights: Tensor, slots: Tensor, shared: Tensor | None) -> Tensor:
    return module("moe.combine", y).forward(y, weights, slots, shared)


@_opaque(lambda dx, slots: dx.new_empty((slots.shape[0], dx.shape[1])))
def moe_combine_total(dx: Tensor, slots: Tensor) -> Tensor:
    return module("moe.combine", dx).total(dx, slots)


@_opaque(lambda dout, y, weights, slots: _same(y, weights))
def moe_combine_backward(dout: Tensor, y: Tensor, weights: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return module("moe.combine", y).backward(dout, y, weights, slots)


OPS = {
    "attention": SimpleNamespace(
        packed_forward=attention_packed_forward,
        packed_backward=attention_packed_backward,
        paged_forward=attention_paged_forward,
        write_kv=attention_write_kv,
    ),
    "embedding": SimpleNamespace(forward=embedding_forward, backward=embedding_backward),
    "rotary.latent_rope": SimpleNamespace(forward=latent_rope_forward),
    "linear": SimpleNamespace(
        forward=linear_forward,
        grad_input=linear_grad_input,
        grad_weight=linear_grad_weight,
        grad_bias=linear_grad_bias,
    ),
    "linear_cross_entropy": SimpleNamespace(
        forward=linear_cross_entropy_forward, backward=linear_cross_entropy_backward
    ),
    "linear_swiglu": SimpleNamespace(forward=linear_swiglu_forward),
    "moe.combine": SimpleNamespace(forward=moe_combine_forward, total=moe_combine_total, backward=moe_combine_backward),
    "moe.grouped_linear": SimpleNamespace(
        forward=moe_grouped_linear_forward,
        swiglu_forward=moe_grouped_linear_swiglu_forward,
        grad_input=moe_grouped_linear_grad_input,
        grad_weight=moe_grouped_linear_grad_weight,
    ),
    "moe.groups": SimpleNamespace(forward=moe_groups_forward),
    "moe.router": SimpleNamespace(
        forward=moe_router_forward, grouped_forward=moe_router_grouped_forward, backward=moe_router_backward
    ),
    "rotary.qk_norm_rope": SimpleNamespace(forward=qk_norm_rope_forward),
    "rms_norm": SimpleNamespace(forward=rms_norm_forward, add_forward=rms_norm_add_forward, backward=rms_norm_backward),
    "rotary.rope": SimpleNamespace(forward=rope_forward),
    "rotary.rope_to_cache": SimpleNamespace(forward=rope_to_cache_forward),
    "swiglu": SimpleNamespace(forward=swiglu_forward, backward=swiglu_backward),
}
"""By operator: the functions of its kernel module and of its CPU twin, under the same names."""
