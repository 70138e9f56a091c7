"""A mixture of experts on this machine: a token's experts, their results and gradients, alone and among others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vexact.audit.doctor import probes
from vexact.audit.doctor.result import CheckResult, error, ok
from vexact.models.config import MoeConfig
from vexact.models.layers import MoE
from vexact.models.opset import op_set

BATCHES = (1, 2, 3, 7, 25, 49, 100)
TINY = MoeConfig(
    num_experts=8, top_k=3, intermediate_size=48, layers=frozenset((0,)), scoring="sigmoid", correction_bias=True
)
HIDDEN = 64
_MOST_EXPERTS = 16  # whose products are tried: one after another is the same again


def check_experts(
    device: str, dtype: torch.dtype, moe: MoeConfig = TINY, hidden: int = HIDDEN, title: str = "probe experts"
) -> CheckResult:
    """The router with all of its experts, the whole layer with some of them."""
    name = f"{title} {probes.short(dtype)}"
    few = _fewer(moe)
    routes = [] if few == moe else _changed(_layer(replace(moe, intermediate_size=1), hidden, device, dtype), 1)
    bad = [f"{rows} rows" for rows in sorted({*routes, *_changed(_layer(few, hidden, device, dtype), 3)})]
    if bad:
        return error(name, f"tokens change with the number of tokens: {probes.some(bad)}", probes.REPORT)
    return ok(
        name,
        f"routes, rows and gradients have the same bits in batches of 1 to {max(BATCHES)}: {moe.top_k} of "
        f"{moe.num_experts} experts of {moe.intermediate_size}",
    )


def _changed(layer: MoE, num_compared: int) -> list[int]:
    """Batch sizes in which a token's routes, or also its result and the gradient of its input, are others."""
    weight = layer.router.weight
    x = probes.normal((max(BATCHES), weight.shape[1]), weight.dtype, str(weight.device), seed=1)
    whole = _run(layer, x)[:num_compared]
    return [
        rows
        for rows in BATCHES
        for start in (0, len(x) - rows)
        if not all(torch.equal(a[start : start + rows], b) for a, b in zip(whole, _run(layer, x[start : start + rows])))
    ]


def _run(layer: MoE, x: Tensor) -> tuple[Tensor, ...]:
    """What is compared, as whole numbers: a hash of the experts (T,), results and gradients (T, H)."""
    digest = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    leaf = x.clone().requires_grad_()
    out = layer(leaf, digest)
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    return digest, probes.bits(out.detach()), probes.bits(gradient)


def _layer(moe: MoeConfig, hidden: int, device: str, dtype: torch.dtype) -> MoE:
    layer = MoE(hidden, moe, 0, op_set()).to(device, dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(probes.normal(tuple(parameter.shape), dtype, device, seed) * parameter.shape[-1] ** -0.5)
    return layer


def _fewer(moe: MoeConfig) -> MoeConfig:
    """The same layer with some of its experts, as many in every group."""
    least = -(-moe.top_k // moe.top_groups)
    size = min(moe.num_experts // moe.num_groups, max(2, least, _MOST_EXPERTS // moe.num_groups))
    return replace(moe, num_experts=size * moe.num_groups)
