"""A diagnosis as a file that one process can repeat: the request, both sides' settings, the weights, the two rows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vexact.audit.compare import TokenDifference
from vexact.audit.explain.divergence import Divergence, Side
from vexact.audit.explain.finder import find
from vexact.audit.explain.operators import operators_of, restore_operators
from vexact.audit.explain.trainer_side import Trainer, first_unequal_weight
from vexact.models import CausalLM, ModelConfig, load_model
from vexact.models.load import model_of
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.mismatch import apply_mismatch
from vexact.training import Actor
from vexact.types import Sample
from vexact.weights import checksum

FORMAT = 1
_ARRAYS = ("logprobs", "min_logits", "route_digests")  # of a sample
MAX_WEIGHT_BYTES = 1 << 30
"""Larger models are not copied into the file; it then holds their checksums and the checkpoint's path."""


def explain(
    engine: Engine,
    actor_or_model: Actor | CausalLM,
    sample: Sample,
    out_path: str | Path | None = None,
    *,
    sampling_params: SamplingParams | None = None,
    observed: TokenDifference | None = None,
    model_path: str | Path | None = None,
) -> Divergence:
    """Where rollout and trainer first part for this sample.

    Both sides compute the request again, alone: the engine from its prompt, token by token, the trainer in one packed
    forward. Neither side's weights change; the engine's counters and its cache of free pages do.

    Args:
        engine: idle, with the weights that generated the sample.
        out_path: where to write a replay file.
        sampling_params: the request's; without them the sampler's filters are not checked.
        observed: what the audit saw, to notice a trainer that behaves differently in a batch.
        model_path: a checkpoint with these weights, noted in the replay file for models too large to copy into it.

    Raises:
        RuntimeError: the engine has unfinished requests.
        ValueError: an actor of several ranks.
    """
    with actor_or_model.resident() if isinstance(actor_or_model, Actor) else nullcontext():
        trainer = Trainer.of(actor_or_model)
        divergence, rows = find(engine, trainer, sample, sampling_params, observed)
        if out_path is not None:
            record = _record(engine, trainer, sample, sampling_params, observed, model_path)
            torch.save(record | {"divergence": asdict(divergence), "rows": rows}, out_path)
    return divergence


def replay(file: str | Path, *, model_path: str | Path | None = None) -> Divergence:
    """Repeats a recorded comparison in this process, on the CPU.

    State that only the live engine had (a stale page, a patched scheduler) is not in the file: then the recorded
    divergence is returned with a note that it did not show again.

    Raises:
        ValueError: not a replay file, or the weights at ``model_path`` (default: the recorded path) are others.
    """
    record = _read(file)
    trained = _model(record, model_path)
    rolled = copy.deepcopy(trained)
    with torch.no_grad():
        for name, tensor in record["rollout_weights"].items():
            rolled.get_parameter(name).copy_(tensor)
    engine_config = dict(record["engine"])
    mode, scale = engine_config.pop("mismatch_mode"), engine_config.pop("mismatch_scale")
    lost = restore_operators(trained, record["operators"]["trainer"])
    if mode == "none":
        lost += restore_operators(rolled, record["operators"]["rollout"])
    else:
        apply_mismatch(rolled, mode, scale, engine_config["seed"])
    sample = _sample(record["sample"])
    engine = Engine(model=rolled, **_enough_pages(engine_config, sample))
    engine.weights_version = record["weights_version"]
    params = None if record["params"] is None else SamplingParams(**record["params"])
    observed = None if record["observed"] is None else TokenDifference(**record["observed"])
    found, _ = find(engine, Trainer.of(trained), sample, params, observed)
    return _with_notes(found, _divergence(record["divergence"]), lost)


def _read(file: str | Path) -> dict[str, Any]:
    try:
        record = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a replay file; write one with vexact verify --explain") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{file} is not a replay file of format {FORMAT}; write one with vexact verify --explain")
    return record


def _record(
    engine: Engine,
    trainer: Trainer,
    sample: Sample,
    params: SamplingParams | None,
    observed: TokenDifference | None,
    model_path: str | Path | None,
) -> dict[str, Any]:
    num_bytes = sum(t.numel() * t.element_size() for t in trainer.weights.values())
    unequal = first_unequal_weight(engine.model, trainer)
    held = dict(engine.model.named_parameters())
    return {
        "format": FORMAT,
        "torch": str(torch.__version__),
        "sample": asdict(sample)
        | {name: _tensor(getattr(sample, name)) for name in _ARRAYS if getattr(sample, name) is not None},
        "params": None if params is None else asdict(params),
        "observed": None if observed is None else asdict(observed),
        "engine": asdict(engine.config),
        "weights_version": engine.weights_version,
        "operators": {"rollout": operators_of(engine.model), "trainer": operators_of(trainer.model)},
        "config": trainer.model.config.raw,
        "dtype": str(trainer.head_weight.dtype).removeprefix("torch."),
        "model_path": None if model_path is None else str(model_path),
        "checksums": {name: checksum(tensor) for name, tensor in trainer.weights.items()},
        "weights": _host(trainer.weights) if num_bytes <= MAX_WEIGHT_BYTES else None,
        "rollout_weights": _host({name: held[name] for name in unequal[1] if name in held} if unequal else {}),
    }


def _model(record: Mapping[str, Any], model_path: str | Path | None) -> CausalLM:
    """The trainer's model of the record."""
    if model_path is None and record["weights"] is not None:
        return model_of(ModelConfig.from_hf_dict(record["config"]), record["weights"])
    path = model_path or record["model_path"]
    if path is None:
        raise ValueError("the replay file holds no weights, only checksums; give the checkpoint with --model_path")
    model = load_model(path, dtype=getattr(torch, record["dtype"]))
    held = {name: checksum(p) for name, p in model.named_parameters()}
    wrong = [name for name, expected in record["checksums"].items() if held.get(name) != expected]
    if wrong:
        raise ValueError(
            f"{path} holds other weights than the replay file was made with: {len(wrong)} tensors differ, first "
            f"{wrong[0]}; give the checkpoint of weights version {record['weights_version']} with --model_path"
        )
    return model


def _enough_pages(config: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """The engine's settings with a cache for this one request."""
    pages = -(-sample.num_tokens // config["page_size"])
    return config | {"num_pages": pages, "kv_cache_bytes": None, "max_num_seqs": 1, "enable_sleep_mode": False}


def _with_notes(found: Divergence, recorded: Divergence, lost: list[str]) -> Divergence:
    notes = [f"the package has no operator {name}, which the recording names; the invariant one ran" for name in lost]
    same = (found.stage, found.where, found.position, found.element) == (
        recorded.stage,
        recorded.where,
        recorded.position,
        recorded.element,
    )
    if same:
        return replace(found, notes=(*found.notes, *notes, "reproduced: same place as recorded"))
    if not found.found or found.stage == "generation state":
        notes.append("not reproduced in a fresh process: the recorded run's live state caused it")
        return replace(recorded, notes=(*recorded.notes, *notes))
    notes.append(f"the recording found: {recorded.stage}: {recorded.summary}")
    return replace(found, notes=(*found.notes, *notes))


def _sample(record: Mapping[str, Any]) -> Sample:
    arrays = {name: record[name].numpy() for name in _ARRAYS if record.get(name) is not None}
    return Sample(**{**record, **arrays})


def _divergence(record: Mapping[str, Any]) -> Divergence:
    sides = {name: None if record[name] is None else Side(**record[name]) for name in ("rollout", "trainer")}
    return Divergence(**{**record, **sides})


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())


def _host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
