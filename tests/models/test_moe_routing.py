"""The layer routes and groups in one operator, and in two as soon as somebody replaced one of them: the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_configs import FAMILIES

from vexact.models import ModelConfig, random_model
from vexact.models.layers import MoE
from vexact.models.layers.context import Routing
from vexact.models.opset import op_set, set_ops


class Counted:
    """An operator that notes its calls."""

    def __init__(self, op):
        self.op, self.calls = op, []

    def __call__(self, *args, **settings):
        self.calls.append(settings.get("padding"))
        return self.op(*args, **settings)


def layer_of(family):
    model = random_model(ModelConfig.from_hf_dict(FAMILIES[family]), 0)
    return next(layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE))


def forward(layer, ops, padding, x):
    set_ops(layer, ops)
    digest, loads = torch.zeros(len(x), dtype=torch.int64), torch.zeros(9, layer.moe.num_experts, dtype=torch.int64)
    return layer(x, digest, Routing(padding=padding, loads=loads)), digest, loads


@pytest.mark.parametrize("padded", [None, (), (0, 3), range(5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_operator_and_two_have_the_same_bits(family, padded):
    layer, ops = layer_of(family), op_set()
    x = torch.randn(5, layer.router.weight.shape[1], generator=torch.Generator().manual_seed(1))
    padding = None if padded is None else torch.tensor([token in padded for token in range(5)])
    fused, route, group_tokens = (Counted(op) for op in (ops.route_and_group, ops.route, ops.group_tokens))
    with torch.no_grad():
        expected = forward(layer, replace(ops, route_and_group=fused), padding, x)
        assert [seen is padding for seen in fused.calls] == [True]
        for parts in ({"route": route}, {"group_tokens": group_tokens}, {"route": route, "group_tokens": group_tokens}):
            found = forward(layer, replace(ops, route_and_group=fused, **parts), padding, x)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert (len(fused.calls), len(route.calls), len(group_tokens.calls)) == (1, 2, 2)
    found = forward(layer, ops, padding, x)
    assert found[0].requires_grad
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert int(expected[2].sum()) == (5 - len(padded or ())) * layer.moe.top_k


def test_stock_operators_are_called_at_once_too():
    assert op_set("stock").fuses_routing
    assert not replace(op_set("stock"), route=op_set().route).fuses_routing
