"""Operators up to the logits: the rows of the first one that differs, from a second pass of both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.audit.explain.align import Mismatch, first_mismatch, only_on_one_side
from vexact.audit.explain.case import Case
from vexact.audit.explain.divergence import Divergence, Side, first_element
from vexact.audit.explain.expert_text import expert_of, listed, route_change
from vexact.audit.explain.outputs import EXPERTS
from vexact.audit.explain.recorder import Kept, Recorder, Spot
from vexact.audit.explain.rollout_side import LOGITS, RolloutReplay, replay_rollout
from vexact.audit.explain.trainer_side import HEAD, TrainerReplay, replay_trainer


def operator_stage(case: Case) -> Divergence | None:
    """The first operator that gives other bits, and a page that does not give back what was written to it."""
    found = first_mismatch(case.rollout.recorder, case.packed.recorder)
    if found is None:
        return None
    rollout, packed = _second_pass(case, Spot(found.site, found.position))
    kept = rollout.recorder.kept
    assert kept is not None, "the site was recorded in the first pass"
    if found.site == HEAD:
        assert packed.spot_logits is not None, "the site was recorded in the first pass"
        trained, right = packed.spot_logits, None
    else:
        other = packed.recorder.kept
        assert other is not None, "the site was recorded in the first pass"
        trained, right = other.row, _equals(other.row, other.expected)
    case.rows = {"rollout": kept.row, "trainer": trained}
    if found.site.output == EXPERTS:
        return _changed_route(case, found, kept, right)
    element = first_element(kept.row, trained) if kept.row.dtype == trained.dtype else None
    ours = _equals(kept.row, kept.expected)
    stage, summary, notes = "operator", f"{found.site} differs first", _operator_notes(case, found, ours and right)
    if found.site in rollout.recorder.stale:
        stage = "kv page"
        summary = (
            f"stale KV page: position {rollout.recorder.stale[found.site]} reads back other bits than were written"
        )
    elif found.site == HEAD and _is_bf16(kept.row) and not _is_bf16(trained):
        stage, summary = "logits", "the rollout's head rounds its logits to bf16"
    elif kept.experts:
        notes.append(f"{listed(kept.experts)} of this token")
    return case.divergence(
        stage,
        summary,
        found.position,
        where=str(found.site),
        op=found.site.op,
        layer=found.site.layer,
        expert=expert_of(found.site, element.index, kept.experts) if element else None,
        element=element.index if element else (),
        ulp=element.ulp if element else None,
        rollout=Side.of(element.rollout if element else 0.0, found.rollout, ours),
        trainer=Side.of(element.trainer if element else 0.0, found.trainer, right),
        notes=tuple(notes),
    )


def logits_stage(case: Case) -> Divergence | None:
    """What the sampler is given, against what the head computed (equal on both sides by now)."""
    given = case.rollout.recorder.rows[LOGITS]
    head = case.packed.recorder.rows[HEAD].prints
    wrong = [p for p in sorted(given.prints) if given.prints[p] != head[p]]
    if not wrong:
        return None
    position = wrong[0]
    rollout, packed = _second_pass(case, Spot(HEAD, position))
    assert rollout.spot_logits is not None, "the site was recorded in the first pass"
    assert packed.spot_logits is not None, "the site was recorded in the first pass"
    case.rows = {"rollout": rollout.spot_logits, "trainer": packed.spot_logits}
    element = first_element(rollout.spot_logits, packed.spot_logits)
    assert element is not None, "the fingerprints of this row differ"
    rounded = torch.equal(rollout.spot_logits, packed.spot_logits.bfloat16().float())
    what = "are rounded to bf16" if rounded else "are changed"
    return case.divergence(
        "logits",
        f"logits {what} between the head and the sampler",
        position,
        where="sampler input",
        element=element.index,
        ulp=element.ulp,
        rollout=Side.of(element.rollout, given.calls[position]),
        trainer=Side.of(element.trainer, case.packed.recorder.rows[HEAD].calls[position]),
        notes=(f"{len(wrong)} of {len(given.prints)} rows differ; the head's own output agrees on both sides",),
    )


def _changed_route(case: Case, found: Mismatch, kept: Kept, right: bool | None) -> Divergence:
    """A token whose router has the same logits on both sides and chooses other experts."""
    change = route_change(case.rollout.recorder, case.packed.recorder)
    assert change is not None, "the fingerprints of its experts differ"
    ours = _equals(kept.row, kept.expected)
    return case.divergence(
        "route",
        change.describe(),
        found.position,
        where=str(found.site),
        op=found.site.op,
        layer=found.site.layer,
        rollout=Side.of(listed(change.rollout), found.rollout, ours),
        trainer=Side.of(listed(change.trainer), found.trainer, right),
        notes=tuple(_operator_notes(case, found, ours and right)),
    )


def _second_pass(case: Case, spot: Spot) -> tuple[RolloutReplay, TrainerReplay]:
    """Both sides again, keeping the row of one spot."""
    rollout = replay_rollout(case.engine, case.sample, case.params, Recorder(keep=spot))
    return rollout, replay_trainer(case.trainer, case.sample, Recorder(keep=spot))


def _operator_notes(case: Case, found: Mismatch, both_right: bool | None) -> list[str]:
    site, sides = found.site, (case.rollout.recorder, case.packed.recorder)
    notes = [f"{found.num_different} of {found.num_compared} tokens differ here; all operators before it agree"]
    if found.rollout.arguments != found.trainer.arguments:
        notes.append(f"arguments: rollout {dict(found.rollout.arguments)}, trainer {dict(found.trainer.arguments)}")
    elif both_right:
        notes.append(f"each side computes {site.op} as it should: what it is given was changed since the last operator")
    missing = only_on_one_side(*sides)
    if missing:
        notes.append(f"only one side calls {', '.join(missing[:3])}")
    change = route_change(*sides)
    if change is not None and site.output != EXPERTS:
        notes.append(f"{change.num_different} tokens change experts; first {change.describe()}")
    return notes


def _equals(row: Tensor, expected: Tensor | None) -> bool | None:
    if expected is None:
        return None
    return row.dtype == expected.dtype and first_element(row, expected) is None


def _is_bf16(row: Tensor) -> bool:
    return torch.equal(row, row.bfloat16().float())
