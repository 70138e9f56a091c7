"""A mixture of experts on this machine: a token's experts, their results and gradients, alone and among others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vexact.audit.doctor import probes
from vexact.audit.doctor.result import CheckResult, error, ok
from vexact.models.config import MoeConfig
from vexact.models.layers.moe import MoE
from vexact.models.opset import op_set
from vexact.ops import combine, group_tokens, grouped_linear, grouped_swiglu, linear, route, swiglu
from vexact.ops.moe.groups import NO_EXPERT, group_tokens_reference

BATCHES = (1, 2, 3, 7, 25, 49, 100)
TINY = MoeConfig(
    num_experts=8, top_k=3, intermediate_size=48, layers=frozenset((0,)), scoring="sigmoid", correction_bias=True
)
HIDDEN = 64
_OF_WEIGHTS = ("the gradient of gate and up", "the gradient of down")
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


def check_expert_products(
    device: str, dtype: torch.dtype, moe: MoeConfig = TINY, hidden: int = HIDDEN, title: str = "probe grouped products"
) -> CheckResult:
    """What an expert computes, operator by operator: against plain products, and without the other experts' tokens."""
    name, few = f"{title} {probes.short(dtype)}", _fewer(moe)
    bad = list(dict.fromkeys(_wrong_products(_Products(few, hidden, device, dtype), moe)))
    if bad:
        return error(name, f"other bits than alone: {probes.some(bad)}", probes.REPORT)
    width = few.intermediate_size
    return ok(
        name,
        f"groups, rows, sums and all gradients of an expert have the bits they have alone: {2 * width} x {hidden}, "
        f"{hidden} x {width}",
    )


class _Products:
    """The operators of a layer on fixed numbers."""

    def __init__(self, moe: MoeConfig, hidden: int, device: str, dtype: torch.dtype) -> None:
        width, self.num_experts = moe.intermediate_size, moe.num_experts
        self.x, self.dout = (probes.normal((max(BATCHES), hidden), dtype, device, seed) for seed in (1, 2))
        self.first = probes.normal((self.num_experts, 2 * width, hidden), dtype, device, 3) * hidden**-0.5
        self.second = probes.normal((self.num_experts, hidden, width), dtype, device, 4) * width**-0.5
        logits = probes.normal((max(BATCHES), self.num_experts), torch.float32, device, 5)
        self.routes = route(logits, top_k=moe.top_k)

    def run(self, tokens: Tensor, only: int | None = None) -> dict[str, Tensor]:
        """Of these tokens (T,): what stands by token (T, ...), and the gradients of the experts' weights; with ``only``
        as if no other expert got any."""
        leaves = [x.clone().requires_grad_() for x in (self.x[tokens], self.first, self.second)]
        weights = self.routes.weights[tokens]
        experts = self.routes.experts[tokens]
        if only is not None:
            experts = torch.where(experts == only, experts, NO_EXPERT)
        groups = group_tokens(experts, self.num_experts)
        inner = grouped_linear(leaves[0], leaves[1], groups, gather=True)
        outer = grouped_linear(swiglu(inner), leaves[2], groups, gather=False)
        out = combine(outer, weights, groups)
        dx, dfirst, dsecond = torch.autograd.grad(out, leaves, self.dout[tokens])
        slots = groups.slots.long().clamp_min(0)
        with torch.no_grad():
            joined = grouped_swiglu(leaves[0], leaves[1], groups, gather=True)[slots]
        return {
            "gate and up": inner.detach()[slots],
            "joined gate and up": joined,
            "down": outer.detach()[slots],
            "the sum over experts": out.detach(),
            "the gradient of rows": dx,
            "the gradient of gate and up": dfirst,
            "the gradient of down": dsecond,
        }


def _wrong_products(products: _Products, moe: MoeConfig) -> Iterator[str]:
    experts, everything = products.routes.experts, torch.arange(max(BATCHES), device=products.x.device)
    full = route(probes.normal((max(BATCHES), moe.num_experts), torch.float32, str(experts.device)), top_k=moe.top_k)
    expected = group_tokens_reference(full.experts, moe.num_experts)
    if not all(torch.equal(a, b) for a, b in zip(group_tokens(full.experts, moe.num_experts), expected)):
        yield f"groups of {moe.num_experts} experts"
    whole = products.run(everything)
    activated = swiglu(whole["gate and up"].flatten(0, 1)).view_as(whole["joined gate and up"])
    if not probes.same(activated, whole["joined gate and up"]):
        yield "gate and up joined with the activation"
    for expert in sorted({0, products.num_experts // 2, products.num_experts - 1}):
        tokens = (experts == expert).any(1).nonzero().flatten()
        if not len(tokens):
            continue
        alone, places = products.run(tokens), (experts[tokens] == expert).nonzero(as_tuple=True)
        alone |= {name: products.run(everything, only=expert)[name] for name in _OF_WEIGHTS}
        rows = {
            "gate and up": linear(products.x[tokens], products.first[expert]),
            "down": linear(swiglu(whole["gate and up"][tokens][places]), products.second[expert]),
        }
        for name, row in rows.items():
            if not probes.same(whole[name][tokens][places], row):
                yield f"{name} of expert {expert}, against a plain product"
        for name, ours in whole.items():
            pair = (ours[expert], alone[name][expert]) if name in _OF_WEIGHTS else (ours[tokens], alone[name])
            if not probes.same(*pair):
                yield f"{name} of expert {expert}, without the others"


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
