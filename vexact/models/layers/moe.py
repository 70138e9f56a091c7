"""The feed-forward of experts: those that the router chooses for a token, and those that all tokens go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vexact.models.config import MoeConfig
from vexact.models.layers.context import Routing
from vexact.models.layers.mlp import MLP
from vexact.models.opset import OpSet
from vexact.ops.moe import ExpertGroups, Routes
from vexact.ops.moe.few_tokens import few_tokens, takes_few
from vexact.ops.moe.route_and_group import route_then_group


class MoE(nn.Module):
    """Nothing here depends on what other tokens chose: no capacity, no dropped token, sums in the order of experts."""

    def __init__(self, hidden_size: int, moe: MoeConfig, layer: int, ops: OpSet) -> None:
        super().__init__()
        self.moe, self.ops = moe, ops
        self.router = Router(hidden_size, moe, layer, ops)
        self.experts = Experts(hidden_size, moe, ops)
        width = moe.shared_intermediate_size
        self.shared = MLP(hidden_size, width, False, ops) if width else None

    def forward(self, x: Tensor, route_digest: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """(T, H) -> (T, H); ``route_digest`` (T,) int64 is added to in place."""
        routing = routing or Routing()
        if routing.loads is None and routing.balance is None and self._takes_few(x):
            shared = None if self.shared is None else self.shared(x)
            logits, bias, settings = self.router.scored(x, route_digest, routing)
            return few_tokens(x, logits, bias, self.experts.gate_up_proj, self.experts.down_proj, shared, **settings)
        routes, groups = self.router(x, route_digest, routing)
        if routing.loads is not None:
            routing.loads[self.router.layer] = groups.offsets[1:] - groups.offsets[:-1]
        out: Tensor = self.ops.combine(
            self.experts(x, groups, routing.again),
            routes.weights,
            groups,
            None if self.shared is None else self.shared(x),
        )
        return out

    def _takes_few(self, x: Tensor) -> bool:
        """Experts that live elsewhere have a forward of their own, and so have operators that were replaced."""
        here = type(self.experts) is Experts and takes_few(x, self.moe.top_k, self.experts.down_proj)
        return here and self.ops.fuses_experts


class Router(nn.Module):
    """Scores every expert for every token. Logits are fp32 and never rounded, whatever the model's dtype."""

    def __init__(self, hidden_size: int, moe: MoeConfig, layer: int, ops: OpSet) -> None:
        super().__init__()
        self.moe, self.layer, self.ops = moe, layer, ops
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        # It balances the load, and no gradient reaches it: a parameter, so that it travels with the weights
        bias = torch.zeros(moe.num_experts) if moe.correction_bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, route_digest: Tensor | None, routing: Routing) -> tuple[Routes, ExpertGroups]:
        """Routes of x (T, H), k a token, and the groups of those that are no padding."""
        ops = self.ops
        choose = ops.route_and_group if ops.fuses_routing else partial(route_then_group, ops.route, ops.group_tokens)
        logits, bias, settings = self.scored(x, route_digest, routing)
        routes, groups = choose(logits, bias, **settings)
        if routing.balance is not None:
            routes = routing.balance.attach(routes, logits, self.layer, self.moe)
        return routes, groups

    def scored(
        self, x: Tensor, route_digest: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Logits (T, E) of x (T, H), the correction bias, and how ``route_and_group`` is to choose by them."""
        moe = self.moe
        return (
            self.ops.linear(x, self.weight, out_dtype=torch.float32),
            self.bias.full_tensor() if isinstance(self.bias, DTensor) else self.bias,
            {
                "top_k": moe.top_k,
                "scoring": moe.scoring,
                "num_groups": moe.num_groups,
                "top_groups": moe.top_groups,
                "normalize": moe.normalize,
                "scale": moe.scale,
                "round_to": x.dtype if moe.round_weights else torch.float32,
                "digest": route_digest,
                "salt": self.layer,
                "padding": routing.padding,
            },
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A cast of the whole model leaves the bias in fp32: rounded, it would choose other experts than the ones that
        the model was trained with."""
        bias = self.bias

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if tensor is not bias or out.dtype == tensor.dtype else tensor.to(out.device)

        return super()._apply(keep, recurse)


class Experts(nn.Module):
    """The weights of all experts, one behind the other along axis 0."""

    def __init__(self, hidden_size: int, moe: MoeConfig, ops: OpSet) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(moe.num_experts, hidden_size, moe.intermediate_size))

    def forward(self, x: Tensor, groups: ExpertGroups, again: dict[str, Any] | None = None) -> Tensor:
        """(T, H) -> (P, H), a row for every pair of token and expert, in the order of ``groups``.

        ``again`` is for experts that live elsewhere, and their notes.
        """
        activated = self.ops.grouped_swiglu(x, self.gate_up_proj, groups, gather=True)
        out: Tensor = self.ops.grouped_linear(activated, self.down_proj, groups, gather=False)
        return out
