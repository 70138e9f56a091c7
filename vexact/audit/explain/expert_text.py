"""Experts in the finder's words: which one a number belongs to, and whose choice changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.audit.explain.outputs import EXPERTS, MISPLACED, NOWHERE
from vexact.audit.explain.recorder import BITS, Recorder, Rows, Site
from vexact.models.hf_names import is_experts
from vexact.ops.moe.digest import digest_of

_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class RouteChange:
    """The first token, in the order of layers and then of positions, that goes to other experts in training."""

    site: Site
    position: int
    rollout: tuple[int, ...]
    trainer: tuple[int, ...]
    same_logits: bool  # of the router, for this token
    num_different: int  # tokens of this layer
    num_compared: int

    def describe(self) -> str:
        logits = "equal" if self.same_logits else "different"
        return (
            f"layer {self.site.layer}: token {self.position} chose {listed(self.rollout)} in the rollout and "
            f"{', '.join(map(str, self.trainer))} in training; router logits {logits}"
        )


def route_change(rollout: Recorder, trainer: Recorder) -> RouteChange | None:
    """None when every token has the same experts in every layer."""
    for site, ours in rollout.rows.items():
        theirs = trainer.rows.get(site)
        if site.output != EXPERTS or theirs is None:
            continue
        common = sorted(ours.experts.keys() & theirs.experts.keys())
        changed = [p for p in common if ours.experts[p] != theirs.experts[p]]
        if changed:
            first = changed[0]
            same = _logits_of(rollout, site).prints.get(first) == _logits_of(trainer, site).prints.get(first)
            return RouteChange(site, first, ours.experts[first], theirs.experts[first], same, len(changed), len(common))
    return None


def _logits_of(recorder: Recorder, site: Site) -> Rows:
    return recorder.rows.get(Site(site.module, "linear", repeat=site.repeat), Rows())


def route_digests(recorder: Recorder, positions: Sequence[int]) -> list[int] | None:
    """For tokens at these positions the digest of all layers' experts, as the model makes it; None without experts."""
    sites = [site for site in recorder.rows if site.output == EXPERTS]
    if not sites:
        return None
    total = torch.zeros(len(positions), dtype=torch.int64)
    for site in sites:
        assert site.layer is not None, "routers are parts of layers"
        experts = recorder.rows[site].experts
        total += digest_of(torch.tensor([experts[position] for position in positions]), site.layer)
    return total.tolist()


def listed(experts: Sequence[int]) -> str:
    """
    >>> listed((2, 5))
    'experts 2, 5'
    """
    words = {NOWHERE: "none", MISPLACED: "another one's place"}
    return f"experts {', '.join(words.get(expert, str(expert)) for expert in experts)}"


def expert_of(site: Site, element: tuple[int, ...], experts: Sequence[int]) -> int | None:
    """Whose number ``element`` of a token's row is; None for one that belongs to several or none."""
    if not element:
        return None
    if site.op == "linear" and site.module.endswith(".router"):
        return element[0]
    per_expert = site.op.startswith("grouped_") or (site.op == "route" and site.output == "weights")
    return experts[element[0]] if per_expert else None


def experts_of_tensor(name: str, held: Tensor, sent: Tensor) -> list[int]:
    """The experts in whose part of a tensor, alike in shape and dtype, some bit differs; none for one without."""
    if not (is_experts(name) or ".router." in name):
        return []
    left, right = (x.detach().contiguous().view(BITS[x.element_size()]).reshape(len(x), -1) for x in (held, sent))
    return (left != right.to(left.device)).any(1).nonzero().flatten().tolist()


def count_text(experts: Sequence[int], total: int) -> str:
    """Which of ``total`` experts are unequal."""
    more = f" and {len(experts) - _MOST_NAMED} more" if len(experts) > _MOST_NAMED else ""
    return f"of {total} experts {len(experts)} differ: {', '.join(map(str, experts[:_MOST_NAMED]))}{more}"
