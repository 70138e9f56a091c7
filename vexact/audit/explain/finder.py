"""Finds where rollout and trainer part for one request: stage by stage, from the weights to the sampled token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from vexact import interrupt
from vexact.audit.compare import TokenDifference
from vexact.audit.explain.case import Case
from vexact.audit.explain.divergence import Divergence, Side, first_element
from vexact.audit.explain.expert_text import count_text, experts_of_tensor
from vexact.audit.explain.operator_stages import logits_stage, operator_stage
from vexact.audit.explain.recorder import Recorder, Site, Spot
from vexact.audit.explain.rollout_side import CachedPage, cached_pages, page_prints, replay_rollout
from vexact.audit.explain.sampler_stages import recorded_stage, sampler_stage
from vexact.audit.explain.trainer_side import Trainer, first_unequal_weight, replay_trainer, weights_given_back
from vexact.rollout import Engine, SamplingParams
from vexact.types import Sample
from vexact.weights import checksum

SLEEP = "actor_rollout_ref.rollout.enable_sleep_mode"


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
    stages = (_inputs, _pages, operator_stage, logits_stage, _sampler, _training_head, _recorded)
    for stage in stages:
        interrupt.check()
        found = stage(case)
        if found is not None:
            return found, case.rows
    return _nothing(case), case.rows


def _weights(engine: Engine, trainer: Trainer, sample: Sample) -> Divergence | None:
    unequal = first_unequal_weight(engine.model, trainer)
    if unequal is None:
        return _weights_before(engine, trainer, sample)
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


def _weights_before(engine: Engine, trainer: Trainer, sample: Sample) -> Divergence | None:
    """Weights that the rollout no longer holds: its memory was given back, and it got the trainer's again."""
    held = engine.weights.given_back
    if held is None or held.version != sample.weights_version:
        return None
    wrong = weights_given_back(held, trainer)
    if not wrong:
        return None
    name = wrong[0]
    return Divergence(
        "weights",
        f"tensor {name} was another when it sampled",
        sample.request_id,
        where=f"tensor {name}",
        rollout=Side(f"checksum {held.checksums.get(name, 0):#x}"),
        trainer=Side(f"checksum {checksum(trainer.weights[name]):#x}"),
        notes=(
            f"{len(wrong)} of {len(trainer.weights)} tensors differed: {', '.join(wrong[:4])}",
            f"{SLEEP}=true: the rollout's weights were given back for the update, so the element is not known",
        ),
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
