"""Mixture of experts: choose, sort by expert, multiply, add up. A token's bits depend on that token alone."""

from vexact.ops.moe.combine import combine
from vexact.ops.moe.grouped_linear import grouped_linear
from vexact.ops.moe.grouped_swiglu import grouped_swiglu
from vexact.ops.moe.groups import ExpertGroups, group_tokens
from vexact.ops.moe.route import Routes, route
from vexact.ops.moe.route_and_group import route_and_group

__all__ = [
    "ExpertGroups",
    "Routes",
    "combine",
    "group_tokens",
    "grouped_linear",
    "grouped_swiglu",
    "route",
    "route_and_group",
]
