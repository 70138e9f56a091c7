"""Controlled disagreement: makes the rollout, and it alone, compute something slightly different from the trainer.

What frameworks with two engines suffer by accident can be dialled here, so that its effect on training can be studied.
Every mode keeps runs repeatable. ``scale`` 0 changes nothing in any mode. ``softmax_blocks`` decodes without CUDA
graphs: torch's attention needs the lengths of a batch on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vexact.models.decoder import CausalLM
from vexact.models.opset import mark_replayable, set_ops
from vexact.ops import ExpertGroups, stock

MODES = ("none", "k_order", "softmax_blocks", "bf16_logits", "noise")
LAYER_MODES = ("k_order", "softmax_blocks")
_NOISE_ROWS = 32  # rows of logits drawn at a time, which bounds the memory of the counters
_GOLDEN = -7046029254386353131  # 2**64 / golden ratio as int64, the increment of SplitMix64
_MIX_A, _MIX_B = -4658895280553007687, -7723592293110705685  # SplitMix64's multipliers as int64

Linear = Callable[..., Any]


def check_mismatch(mode: str, scale: float) -> None:
    """
    Raises:
        ValueError: unknown ``mode``, or a ``scale`` outside the mode's range.
    """
    if mode not in MODES:
        raise ValueError(f"mismatch_mode={mode!r} is unknown; use one of {', '.join(MODES)}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"mismatch_scale={scale!r} must be a finite number of at least 0")
    if mode != "noise" and scale > 1:
        raise ValueError(f"mismatch_scale={scale!r}: {mode} takes a share between 0 and 1; only noise takes more")


def apply_mismatch(model: CausalLM, mode: str, scale: float, seed: int = 0) -> None:
    """Replaces operators of ``model`` in place.

    Args:
        mode: ``k_order`` sums the inner dimension of every matrix product in two parts of their own (of experts'
            products, both parts are rounded);
            ``softmax_blocks`` runs attention through torch's SDPA, whose softmax walks other key blocks;
            ``bf16_logits`` rounds the logits to bf16; ``noise`` adds Gaussian noise to them; ``none`` does nothing.
        scale: ``k_order``, ``softmax_blocks``: the share of the decoder layers that is changed, from the first on,
            rounded up; ``bf16_logits``: how far each logit moves towards its rounded value; ``noise``: the standard
            deviation, in units of a logit.
        seed: of the noise.

    Raises:
        ValueError: unknown ``mode``, or ``scale`` out of range.
    """
    check_mismatch(mode, scale)
    if mode == "none" or scale == 0:
        return
    if mode in LAYER_MODES:
        ops = replace(model.ops, attention=stock.attention)
        if mode == "k_order":
            grouped = _grouped(model.ops.grouped_linear)
            activated = _then_swiglu(grouped, model.ops.swiglu)
            linear = _k_order(model.ops.linear)
            ops = replace(model.ops, linear=linear, grouped_linear=grouped, grouped_swiglu=activated)
        for layer in model.layers[: math.ceil(scale * len(model.layers))]:
            set_ops(layer, ops)
        return
    # the model itself calls linear for its head only; the layers below hold operators of their own
    change = _rounding(scale) if mode == "bf16_logits" else _noise(scale, seed)
    model.ops = replace(model.ops, linear=_head(model.ops.linear, change))


def _k_order(linear: Linear) -> Linear:
    def reordered(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        cut = _cut(weight)
        first = linear(x[..., :cut].contiguous(), weight[:, :cut], out_dtype=torch.float32)
        last = linear(x[..., cut:].contiguous(), weight[:, cut:], out_dtype=torch.float32)
        out = last + first
        if bias is not None:
            out = out + bias.float()
        return out.to(out_dtype or x.dtype)

    return mark_replayable(reordered, if_is=linear)


def _grouped(grouped_linear: Linear) -> Linear:
    def reordered(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
        cut = _cut(weight)
        first = grouped_linear(x[:, :cut].contiguous(), weight[..., :cut].contiguous(), groups, gather=gather)
        last = grouped_linear(x[:, cut:].contiguous(), weight[..., cut:].contiguous(), groups, gather=gather)
        return last + first

    return mark_replayable(reordered, if_is=grouped_linear)


def _then_swiglu(grouped_linear: Linear, swiglu: Callable[[Tensor], Tensor]) -> Linear:
    def reordered(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
        return swiglu(grouped_linear(x, weight, groups, gather=gather))

    return mark_replayable(reordered, if_is=swiglu)


def _cut(weight: Tensor) -> int:
    """Where the inner dimension is cut: not in half, since a library may cut there as well."""
    return weight.shape[-1] * 3 // 64 * 8 or 1


def _head(linear: Linear, change: Callable[[Tensor, Tensor], Tensor]) -> Linear:
    def logits(hidden: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        return change(linear(hidden, weight, out_dtype=out_dtype), hidden)

    return mark_replayable(logits, if_is=linear)


def _rounding(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    def rounded(logits: Tensor, hidden: Tensor) -> Tensor:
        target = logits.to(torch.bfloat16).to(logits.dtype)
        return target if scale == 1 else logits + scale * (target - logits)

    return rounded


def _noise(scale: float, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    def noisy(logits: Tensor, hidden: Tensor) -> Tensor:
        noise = torch.cat([gaussian(rows, logits.shape[-1], seed) for rows in hidden.split(_NOISE_ROWS)])
        return logits + scale * noise.to(logits.dtype)

    return noisy


def gaussian(hidden: Tensor, width: int, seed: int) -> Tensor:
    """Standard normal noise (B, width) fp32 that depends on ``seed`` and a row's hidden state only.

    Like rounding error, and unlike a draw per step, it is the same for the same prefix whatever the batch, the
    scheduling or the run. Counter-based: SplitMix64 (Steele, Lea & Flood 2014) of (row key, column).

    Args:
        hidden: (B, H), the rows that the logits come from.
    """
    bits = hidden.float().contiguous().view(torch.int32).long()  # (B, H)
    columns = torch.arange(1, hidden.shape[-1] + 1, device=hidden.device)
    keys = _mix(bits + columns * _GOLDEN).sum(-1) + _int64(seed * _MIX_A)  # integer sums have no order
    counters = _mix(keys).unsqueeze(1) + torch.arange(1, width + 1, device=hidden.device) * _GOLDEN
    lanes = (_mix(counters) >> 41) & 0x7FFFFF  # (B, width), 23 bits
    uniform = lanes.double().add_(0.5).mul_(2.0**-23)  # strictly inside (0, 1)
    return torch.erfinv(2 * uniform - 1).mul_(math.sqrt(2)).float()


def _int64(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap around."""
    z = (z ^ _shift(z, 30)) * _MIX_A
    z = (z ^ _shift(z, 27)) * _MIX_B
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
