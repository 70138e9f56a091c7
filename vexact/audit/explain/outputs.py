"""What an operator produced, token by token: rows in the order of experts are brought back to that of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vexact.ops import ExpertGroups

NOWHERE, MISPLACED = -1, -2
"""In the place of an expert: a pair that no expert gets, and one that stands where its groups say another does."""
EXPERTS = "experts"  # the output of route that names them
_HEADS = dict.fromkeys(("rope", "qk_norm_rope", "latent_rope"), ("query", "key"))
_LABELS = {"add_rms_norm": ("residual", "output"), **_HEADS}
_GROUPED = ("grouped_linear", "grouped_swiglu")
_ROUTING = ("top_k", "scoring", "num_groups", "top_groups", "normalize", "scale", "round_to", "salt")


class Output(NamedTuple):
    """One output of one call, for T tokens."""

    op: str  # whose site it is: route_and_group is a route and a group_tokens
    label: str
    rows: Tensor  # (T, ...)
    experts: Tensor | None = None  # (T, k): whose the parts rows[t, j] are, or what the row was made of


def outputs_of(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Output]:
    """The outputs in the order in which they come about."""
    if op == "route":
        experts, weights = result
        return [Output(op, EXPERTS, experts, experts), Output(op, "weights", weights, experts)]
    if op == "group_tokens":
        standing = _standing(ExpertGroups(*result))
        return [Output(op, "output", standing, standing)]
    if op == "route_and_group":
        routes, groups = result
        return [*outputs_of("route", args, kwargs, routes), *outputs_of("group_tokens", args, kwargs, groups)]
    if op in _GROUPED or op == "combine":
        groups = kwargs.get("groups") or args[2]
        rows = result if op == "combine" else _by_token(result, groups)
        return [Output(op, "output", rows, _standing(groups))]
    if op == "add_rms_norm":  # the residual is an input of the norm, hence the earlier of the two
        return [Output(op, "residual", result[1]), Output(op, "output", result[0])]
    labels = _LABELS.get(op, ("output",))
    return [Output(op, *pair) for pair in zip(labels, result if isinstance(result, tuple) else (result,))]


def deciding_arguments(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The scalar arguments on which bits depend, by name."""
    if op == "attention":
        causal = args[6] if len(args) > 6 else kwargs.get("causal", True)
        return (("softmax_scale", args[4] if len(args) > 4 else kwargs["softmax_scale"]), ("causal", causal))
    if op in ("rms_norm", "add_rms_norm"):
        return (("eps", args[-1] if "eps" not in kwargs else kwargs["eps"]),)
    if op == "latent_rope":
        return (("interleaved", args[5] if len(args) > 5 else kwargs["interleaved"]),)
    if op in ("route", "route_and_group"):
        return tuple((name, _plain(kwargs[name])) for name in _ROUTING if name in kwargs)
    return ()


def without_effects(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a second call: a digest is added to in place, and was."""
    return kwargs | {"digest": None} if "digest" in kwargs else kwargs


def _standing(groups: ExpertGroups) -> Tensor:
    """(T, k) int32: the expert in whose interval the pair's place is."""
    rows, slots, offsets = groups
    places = slots.long().clamp_min(0)
    experts = torch.searchsorted(offsets[1:].contiguous(), places.int(), right=True).int()
    pairs = torch.arange(slots.numel(), device=slots.device).view_as(slots)
    experts = torch.where(rows.long()[places] == pairs, experts, MISPLACED)
    return torch.where(slots >= 0, experts, NOWHERE)


def _by_token(result: Tensor, groups: ExpertGroups) -> Tensor:
    """(P, N) -> (T, k, N), zeros for a pair without expert."""
    slots = groups.slots
    return result[slots.long().clamp_min(0)].masked_fill((slots < 0).unsqueeze(2), 0)


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
