"""What an engine needs from a checkpoint directory or from a ready model: weights, tokenizer, end-of-text tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from vexact.models import ModelConfig
from vexact.models.decoder import CausalLM
from vexact.models.load import load_parts, no_rows, to_empty, whole
from vexact.models.opset import attention_name
from vexact.models.tokenizer import has_tokenizer, read_tokenizer
from vexact.rollout.baseline import apply_baseline
from vexact.rollout.engine_config import EngineConfig
from vexact.rollout.execution.weight_memory import WeightMemory
from vexact.rollout.mismatch import apply_mismatch
from vexact.rollout.requests.stop_strings import Tokenizer

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device and what belongs to it."""

    model: CausalLM
    device: torch.device
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    config: EngineConfig  # as it was given, but for pages that the stock attention asks for
    attention: str  # by name, with what there is to say about it
    weights: WeightMemory  # with what can be given back, if that was asked for
    own_attention: bool | None = None  # whether it is the invariant one, of a model on stock operators


def load(
    model_path: str | Path | None,
    config: EngineConfig,
    *,
    model: CausalLM | None,
    tokenizer: Tokenizer | None,
    eos_token_ids: Sequence[int] | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    read_weights: bool = True,
) -> Loaded:
    """Load from ``model_path``, or wrap ``model`` as it is (then ``dtype``, ``device`` and the operators are its own).

    Raises ValueError unless exactly one of the two is given, for an unknown dtype, and for a mismatch on a ready model,
    which may be the trainer's as well, as may its weights be that are to be given back; and for an ``eos_token_ids``
    outside the vocabulary.
    """
    if (model_path is None) == (model is None):
        raise ValueError("Engine needs exactly one of model_path=<directory> and model=<a loaded model>")
    if model is not None and config.mismatch_mode != "none":
        raise ValueError(
            f"mismatch_mode={config.mismatch_mode!r} needs model_path: a ready model keeps its own operators; give the "
            "engine a model that apply_mismatch() of vexact.rollout.mismatch has changed"
        )
    if model is not None and config.enable_sleep_mode:
        raise ValueError(
            "enable_sleep_mode=True needs model_path: the weights of a ready model are not the engine's to give back"
        )
    if not read_weights and not config.enable_sleep_mode:
        raise ValueError("read_weights=False needs enable_sleep_mode=True: the engine begins as one that sleeps")
    found = None
    weights = WeightMemory()
    if model is None:
        assert model_path is not None
        model = load_parts(
            model_path,
            lambda model: None,
            whole if read_weights else no_rows,
            dtype=_torch_dtype(dtype),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            ops="invariant" if config.batch_invariant else "stock",
            attn_impl=config.attn_impl,
            allocate=weights.allocate if config.enable_sleep_mode else to_empty,
        )
        if not config.batch_invariant:
            config, found = apply_baseline(model, config)
        apply_mismatch(model, config.mismatch_mode, config.mismatch_scale, config.seed)
        if tokenizer is None and has_tokenizer(model_path):  # without one: token ids in, token ids out
            tokenizer = read_tokenizer(model_path)
        if not read_weights:
            weights.hide()
    eos = end_of_sequence_ids(model.config, tokenizer) if eos_token_ids is None else _given_eos(model, eos_token_ids)
    device = model.lm_head_weight.device
    if found is None:
        return Loaded(model, device, tokenizer, eos, config, attention_name(model), weights)
    return Loaded(model, device, tokenizer, eos, config, str(found), weights, found.is_own)


def _given_eos(model: CausalLM, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    vocab_size = model.config.vocab_size
    for index in eos_token_ids:
        if not _is_id(index) or not 0 <= index < vocab_size:
            raise ValueError(f"eos_token_ids holds {index!r}; the model's vocabulary has the ids 0 to {vocab_size - 1}")
    return tuple(int(index) for index in eos_token_ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def end_of_sequence_ids(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The configurations' end-of-sequence tokens and the tokenizer's: a chat template ends its turns with the latter,
    which the configuration of a base model does not name. One that the model cannot sample is named and left out.

    Raises ValueError for one that is no token id.
    """
    own = getattr(tokenizer, "eos_token_id", None)
    raw = config.raw.get("eos_token_id")  # config.json's, where generation_config.json names others
    also = [*(raw if isinstance(raw, list) else [raw]), own]
    found = list(dict.fromkeys([*config.eos_token_ids, *(index for index in also if index is not None)]))
    for index in found:
        if not _is_id(index):
            raise ValueError(
                f"eos_token_id={index!r} of the model or its tokenizer must be a token id, or a list of them"
            )
    outside = [index for index in found if not 0 <= index < config.vocab_size]
    if outside:
        log.warning(
            "end-of-sequence tokens %s are outside the model's vocabulary of %d and never end a response%s",
            outside,
            config.vocab_size,
            "; is the tokenizer this model's?" if own in outside else "",
        )
    return tuple(index for index in found if index not in outside)


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
