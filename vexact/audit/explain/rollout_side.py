"""Generates one request again on the rollout engine with its tokens forced, and watches every stage of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vexact.audit.explain.recorder import Call, Recorder, Site, fingerprints, recording
from vexact.ops import PagedMetadata, SamplingTensors, sample, token_logprobs
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.sampling.sampler import to_host
from vexact.rollout.scheduling.block_manager import page_tokens
from vexact.types import Sample

LOGITS = Site("sampler", "logits")
"""What the sampler is given; the head's own output is another site."""
NUM_LOGIT_ROWS = 8  # kept to fit a temperature


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled token of the replay: what the sampler was given, what it gave, and what it should have given."""

    position: int  # of the row whose logits were sampled
    temperature: float
    token_id: int  # what the sampler drew; the replay goes on with the recorded token
    logprob: float
    min_logit: float
    right_token_id: int  # vexact.ops.sample on the same logits and parameters
    right_logprob: float
    right_min_logit: float
    forced_logprob: float  # the recorded token: at the recorded temperature and threshold,
    untruncated_logprob: float  # without the threshold,
    untempered_logprob: float  # and without the temperature
    recorded_cuts: bool  # the recorded threshold is -inf or one of these logits, as every threshold is of its own row


@dataclass(frozen=True, slots=True, eq=False)
class CachedPage:
    """A page that the prefix cache held for this request when the diagnosis began."""

    page: int
    first_position: int
    layers: list[tuple[Tensor, Tensor]]  # per layer keys and values (page_size, Hkv, D), on the CPU


@dataclass(slots=True, eq=False)
class RolloutReplay:
    """Everything the rollout side did for the request."""

    recorder: Recorder
    token_ids: dict[int, int] = field(default_factory=dict)  # absolute position to token fed
    positions: dict[int, int] = field(default_factory=dict)  # absolute position to rotary position fed
    num_keys: dict[int, int] = field(default_factory=dict)  # last position of a step to keys it attended to
    draws: list[Draw] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # of the first draws, (V,) fp32
    spot_logits: Tensor | None = None  # (V,) fp32 at recorder.keep


def cached_pages(engine: Engine, token_ids: Sequence[int]) -> list[CachedPage]:
    """The pages a new request with these tokens would reuse, with their contents."""
    blocks, page_size = engine._blocks, engine.config.page_size
    tokens = np.asarray(token_ids, np.int64)
    keys: list[bytes] = []
    blocks.extend_keys(keys, tokens, len(tokens) // page_size)
    found: list[CachedPage] = []
    parent = None
    for index, key in enumerate(keys):
        parent = blocks.lookup(key, page_tokens(tokens, index, page_size), parent)
        if parent is None:
            break
        caches = engine._runner.kv_caches
        layers = [(k[parent.page].cpu().clone(), v[parent.page].cpu().clone()) for k, v in caches]
        found.append(CachedPage(parent.page, index * page_size, layers))
    return found


def replay_rollout(engine: Engine, sample_: Sample, params: SamplingParams | None, recorder: Recorder) -> RolloutReplay:
    """Runs the request alone, without the prefix cache, feeding the recorded tokens whatever the sampler draws.

    Raises:
        RuntimeError: the engine has unfinished requests.
    """
    if engine.has_unfinished:
        raise RuntimeError("explain() needs an idle engine; step() until has_unfinished is False or abort_all()")
    result = RolloutReplay(recorder)
    watch = _Watch(result, sample_)
    scheduler = engine._scheduler
    caching, scheduler._caching = scheduler._caching, False  # compute every token, and leave the cache as it is
    try:
        with recording(engine.model, recorder), watch.attached(engine):
            engine.generate([sample_.prompt_token_ids], _forced(sample_, params), [sample_.request_id])
    finally:
        scheduler._caching = caching
    return result


def _forced(sample_: Sample, params: SamplingParams | None) -> SamplingParams:
    params = params or SamplingParams(temperature=sample_.temperature)
    changes: dict[str, Any] = {"max_tokens": len(sample_.token_ids), "ignore_eos": True}
    return replace(params, n=1, stop=None, stop_token_ids=None, **changes)


class _Watch:
    """Sees the inputs of every forward and the sampler's inputs and outputs."""

    def __init__(self, result: RolloutReplay, sample_: Sample) -> None:
        self.result, self.sample = result, sample_
        self.num_computed = 0

    @contextmanager
    def attached(self, engine: Engine) -> Iterator[None]:
        runner, before = engine._runner, engine._runner.on_sampled
        hook = engine.model.register_forward_pre_hook(self._on_forward)
        runner.on_sampled = self._on_sampled
        try:
            yield
        finally:
            hook.remove()
            runner.on_sampled = before

    def _on_forward(self, _model: Any, args: tuple[Any, ...]) -> None:
        input_ids, positions, metadata = args[:3]
        assert isinstance(metadata, PagedMetadata)
        start, stop = self.num_computed, self.num_computed + len(input_ids)
        where = np.arange(start, stop)
        self.result.token_ids.update(zip(where.tolist(), input_ids.tolist()))
        self.result.positions.update(zip(where.tolist(), positions.tolist()))
        self.result.num_keys[stop - 1] = int(metadata.seqused_k[0])
        self.result.recorder.begin(where, self._path(start, stop))
        self.num_computed = stop

    def _path(self, start: int, stop: int) -> str:
        num_prompt = len(self.sample.prompt_token_ids)
        if start >= num_prompt:
            return "decode"
        return "prefill" if start == 0 and stop == num_prompt else "chunk"

    def _on_sampled(self, logits: Tensor, params: SamplingTensors, sampled: Tensor) -> Tensor:
        """Notes the draw and returns it with the recorded token in its place."""
        result, position = self.result, self.num_computed - 1
        index = len(result.draws)
        call = Call("sampler", tuple(logits.shape), str(logits.dtype).removeprefix("torch."))
        result.recorder.add(LOGITS, np.array([position]), logits, call)
        if result.recorder.keep is not None and result.recorder.keep.position == position:
            result.spot_logits = logits[0].cpu().clone()
        if len(result.logits) < NUM_LOGIT_ROWS:
            result.logits.append(logits[0].cpu().clone())
        result.draws.append(_draw(position, logits, params, sampled, self.sample, index))
        forced = sampled.clone()
        forced[0] = self.sample.token_ids[index]
        return forced


def _draw(position: int, logits: Tensor, params: SamplingTensors, sampled: Tensor, sample_: Sample, index: int) -> Draw:
    host = to_host(sampled)
    right = sample(logits, params)
    token = logits.new_tensor([sample_.token_ids[index]], dtype=torch.int64)
    threshold, keep_all = logits.new_tensor([float(sample_.min_logits[index])]), logits.new_tensor([float("-inf")])
    factor, one = logits.new_tensor([sample_.inv_temperature]), logits.new_ones(1)

    def forced(inv_temperature: Tensor, min_logit: Tensor) -> float:
        return float(token_logprobs(logits, token, inv_temperature, min_logit).logprobs)

    return Draw(
        position=position,
        temperature=float(params.temperature[0]),
        token_id=int(host.token_ids[0]),
        logprob=float(host.logprobs[0]),
        min_logit=float(host.min_logits[0]),
        right_token_id=int(right.token_ids[0]),
        right_logprob=float(right.logprobs[0]),
        right_min_logit=float(right.min_logit[0]),
        forced_logprob=forced(factor, threshold),
        untruncated_logprob=forced(factor, keep_all),
        untempered_logprob=forced(one, threshold),
        recorded_cuts=bool(torch.isneginf(threshold).any() | (logits == threshold).any()),
    )


def page_prints(page: CachedPage, layer: int) -> list[tuple[str, list[int]]]:
    """Fingerprints of the page's keys and values in one layer, per token."""
    keys, values = page.layers[layer]
    return [("key", fingerprints(keys)), ("value", fingerprints(values))]
