"""Finds where rollout and trainer part for one request: stage by stage, from the weights to the sampled token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vexact import interrupt
from vexact.audit.compare import TokenDifference
from vexact.audit.explain.align import Mismatch, first_mismatch, only_on_one_side
from vexact.audit.explain.divergence import Divergence, Side, first_element
from vexact.audit.explain.expert_text import (
    count_text,
    expert_of,
    experts_of_tensor,
    listed,
    route_change,
)
from vexact.audit.explain.outputs import EXPERTS
from vexact.audit.explain.recorder import Kept, Recorder, Site, Spot
from vexact.audit.explain.rollout_side import (
    LOGITS,
    CachedPage,
    RolloutReplay,
    cached_pages,
    page_prints,
    replay_rollout,
)
from vexact.audit.explain.sampler_stages import recorded_stage, sampler_stage
from vexact.audit.explain.trainer_side import (
    HEAD,
    Trainer,
    TrainerReplay,
    first_unequal_weight,
    replay_trainer,
)
from vexact.rollout import Engine, SamplingParams
from vexact.types import Sample


@dataclass(slots=True, eq=False)
class Case:
    """One request, both sides, and what was recorded of them."""

    engine: Engine
    trainer: Trainer
    sample: Sample
    params: SamplingParams | None
    observed: TokenDifference | None  # what the audit saw
    pages: list[CachedPage]
    rollout: RolloutReplay
    packed: TrainerReplay
    rows: dict[str, Tensor] = field(default_factory=dict)  # of the unequal token, by side

    def divergence(self, stage: str, summary: str, position: int | None = None, **more: Any) -> Divergence:
        first_row = len(self.sample.prompt_token_ids) - 1
        response = None if position is None or position < first_row else position - first_row
        return Divergence(stage, summary, self.sample.request_id, position=position, response_position=response, **more)


def find(
    engine: Engine,
    trainer: Trainer,
    sample: Sample,
    params: SamplingParams | None = None,
    observed: TokenDifference | None = None,
) -> tuple[Divergence, dict[str, Tensor]]:
    """The first divergence, and the two rows it shows in (empty when it is not a row).

    Raises:
        RuntimeError: the engine has unfinished requests.
    """
    unequal = _weights(engine, trainer, sample)
    if unequal is not None:
        return unequal, {}
    pages = cached_pages(engine, (*sample.prompt_token_ids, *sample.token_ids))
    case = Case(
        engine=engine,
        trainer=trainer,
        sample=sample,
        params=params,
        observed=observed,
        pages=pages,
        rollout=replay_rollout(engine, sample, params, Recorder()),
        packed=replay_trainer(trainer, sample, Recorder()),
    )
    stages: tuple[Callable[[Case], Divergence | None], ...]
    stages = (_inputs, _pages, _operators, _logits, _sampler, _training_head, _recorded)
    for stage in stages:
        interrupt.check()
        found = stage(case)
        if found is not None:
            return found, case.rows
    return _nothing(case), case.rows


def _weights(engine: Engine, trainer: Trainer, sample: Sample) -> Divergence | None:
    unequal = first_unequal_weight(engine.model, trainer)
    if unequal is None:
        return None
    name, wrong = unequal
    held, sent = dict(engine.model.named_parameters()).get(name), trainer.weights[name]
    notes = [f"{len(wrong)} of {len(trainer.weights)} tensors differ: {', '.join(wrong[:4])}"]
    if engine.weights_version != sample.weights_version:
        notes.append(f"the sample is of version {sample.weights_version}, the rollout has {engine.weights_version}")
    common: dict[str, Any] = {"where": f"tensor {name}", "notes": tuple(notes)}
    summary = f"tensor {name} not synced"
    if held is None or held.dtype != sent.dtype or held.shape != sent.shape:
        got = "absent" if held is None else f"{held.dtype}{list(held.shape)}"
        common |= {"rollout": Side(got), "trainer": Side(f"{sent.dtype}{list(sent.shape)}")}
        return Divergence("weights", summary, sample.request_id, **common)
    element = first_element(held, sent)
    assert element is not None, "the fingerprints of this tensor differ"
    experts = experts_of_tensor(name, held, sent)
    if experts:
        common |= {"expert": experts[0], "notes": (*notes, count_text(experts, len(sent)))}
    dtype, shape = str(sent.dtype).removeprefix("torch."), tuple(sent.shape)
    return Divergence(
        "weights",
        summary,
        sample.request_id,
        element=element.index,
        ulp=element.ulp,
        rollout=Side(element.rollout, "", shape, dtype),
        trainer=Side(element.trainer, "", shape, dtype),
        **common,
    )


def _inputs(case: Case) -> Divergence | None:
    """Token ids, rotary positions and key counts that each side fed to the model."""
    tokens = [*case.sample.prompt_token_ids, *case.sample.token_ids]
    for p, (trained, position) in enumerate(zip(case.packed.token_ids, case.packed.positions, strict=True)):
        fed = {
            "input id": (case.rollout.token_ids.get(p), trained, tokens[p]),
            "position": (case.rollout.positions.get(p), position, p),
            "number of keys": (case.rollout.num_keys.get(p, p + 1), p + 1, p + 1),
        }
        for name, (rollout, train, right) in fed.items():
            if (rollout, train) == (right, right):
                continue
            side = "rollout" if rollout != right else "trainer"
            off = f" (off by {rollout - right:+d})" if isinstance(rollout, int) and rollout != right else ""
            return case.divergence(
                "inputs",
                f"the {side} computes the token at position {p} with {name} {rollout if side == 'rollout' else train}"
                f"{off}",
                p,
                where=name,
                rollout=Side(-1 if rollout is None else rollout, _path(case, p)),
                trainer=Side(train, "packed"),
            )
    return None


def _path(case: Case, position: int) -> str:
    rows = next(iter(case.rollout.recorder.rows.values()))
    return rows.calls[position].path if position in rows.calls else ""


def _pages(case: Case) -> Divergence | None:
    """Pages that the prefix cache held, against keys and values that both sides compute alike now."""
    for layer in range(case.trainer.model.config.num_layers):
        for page in case.pages:
            for label, prints in page_prints(page, layer):
                site = Site(f"layers.{layer}.attention", "attention", label)
                for offset, held in enumerate(prints):
                    position = page.first_position + offset
                    fresh = [r.rows[site].prints.get(position) for r in (case.rollout.recorder, case.packed.recorder)]
                    if None not in fresh and fresh[0] == fresh[1] != held:
                        return _stale_page(case, page, layer, label, offset)
    return None


def _stale_page(case: Case, page: CachedPage, layer: int, label: str, offset: int) -> Divergence:
    position = page.first_position + offset
    site = Site(f"layers.{layer}.attention", "attention", label)
    again = replay_trainer(case.trainer, case.sample, Recorder(keep=Spot(site, position)))
    assert again.recorder.kept is not None, "the site was recorded in the first pass"
    held = page.layers[layer][label == "value"][offset]
    fresh = again.recorder.kept.row
    case.rows = {"rollout": held, "trainer": fresh}
    element = first_element(held, fresh)
    assert element is not None, "the fingerprints of this row differ"
    call = case.packed.recorder.rows[site].calls[position]
    return case.divergence(
        "kv page",
        f"stale KV page: cached page {page.page} holds another {label} than the current weights give",
        position,
        where=f"{label} cache, page {page.page}",
        layer=layer,
        element=element.index,
        ulp=element.ulp,
        rollout=Side(element.rollout, "cached page", tuple(held.shape), call.dtype),
        trainer=Side.of(element.trainer, call),
        notes=(
            "computed afresh, both sides agree on this row: the page is of other weights, another prefix or other "
            "operators, or was never written",
        ),
    )


def _operators(case: Case) -> Divergence | None:
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


def _logits(case: Case) -> Divergence | None:
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


def _sampler(case: Case) -> Divergence | None:
    found = sampler_stage(case.rollout.draws, case.sample, case.params is not None)
    return None if found is None else case.divergence(*found[:3], **found[3])


def _training_head(case: Case) -> Divergence | None:
    """The fused head of the trainer against the shared definition on the same hidden states."""
    fused, shared = case.packed.logprobs, case.packed.shared_logprobs
    wrong = np.flatnonzero(fused.view(np.int32) != shared.view(np.int32))
    if not len(wrong):
        return None
    i = int(wrong[0])
    return case.divergence(
        "training head",
        "linear_cross_entropy is not token_logprobs(linear(...)) on the trainer's own hidden states",
        len(case.sample.prompt_token_ids) - 1 + i,
        where="linear_cross_entropy",
        op="linear_cross_entropy",
        rollout=Side(float(shared[i]), "shared definition"),
        trainer=Side(float(fused[i]), "packed"),
        notes=(f"{len(wrong)} of {len(fused)} tokens differ",),
    )


def _recorded(case: Case) -> Divergence | None:
    found = recorded_stage(case.rollout, case.sample, case.packed.logprobs, case.observed)
    return None if found is None else case.divergence(*found[:3], **found[3])


def _nothing(case: Case) -> Divergence:
    return case.divergence(
        "none",
        f"all {len(case.sample.token_ids)} log-probabilities agree: recorded, replayed and trained, and so does every "
        "operator",
    )


def _equals(row: Tensor, expected: Tensor | None) -> bool | None:
    if expected is None:
        return None
    return row.dtype == expected.dtype and first_element(row, expected) is None


def _is_bf16(row: Tensor) -> bool:
    return torch.equal(row, row.bfloat16().float())
