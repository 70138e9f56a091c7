"""Mixture of experts: choose, sort by expert, multiply, add up. A token's bits depend on that token alone."""

from vexact.ops.moe.combine import combine
from vexact.ops.moe.grouped_linear import grouped_linear
from vexact.ops.moe.groups import ExpertGroups, group_tokens
from vexact.ops.moe.route import Routes, route

__all__ = ["ExpertGroups", "Routes", "combine", "group_tokens", "grouped_linear", "route"]
