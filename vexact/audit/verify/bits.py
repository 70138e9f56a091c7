"""Part (a): what the engine computed while sampling against the training forward, as bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vexact import interrupt
from vexact.audit.compare import Comparison, TokenDifference, compare, larger_gap
from vexact.audit.draws import DrawDifference, compare_draws
from vexact.audit.routes import RouteDifference, compare_routes
from vexact.audit.verify.sides import TrainingSide, digests_of, logprobs_of, pack_padded, show_targets
from vexact.audit.verify.workload import Round
from vexact.ops import SamplingTensors
from vexact.rollout import SamplingParams
from vexact.rollout.requests.request import draw_settings, request_seed
from vexact.training.batches.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.training.passes.redraw import Redraw, Redrawn
from vexact.types import Sample

_MOST_PER_BATCH = 6


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """One logit that the two sides disagree about."""

    request_id: str
    position: int  # index in the response of the token that these logits sampled
    token_id: int  # index in the vocabulary
    rollout: float
    trainer: float


@dataclass(slots=True)
class BitTally:
    """Sums over rounds and packings. A token is matched when its log-probability and all its logits have equal bits,
    the row that predicts it goes to the same experts in all layers, and it can be drawn again."""

    tokens: int = 0  # distinct response tokens
    logprobs_compared: int = 0
    logprobs_different: int = 0
    logits_compared: int = 0
    logits_different: int = 0
    max_abs_logprob_diff: float = 0.0
    max_ulp: int = 0
    max_abs_logit_diff: float = 0.0
    non_finite: int = 0  # of the compared log-probabilities: NaN or infinite on either side
    draws_repeated: int = 0
    draws_different: int = 0
    routes_compared: int = 0  # rows of a model with experts
    routes_different: int = 0
    routes_missing: int = 0  # rows of which the training side does not say what they chose
    unmatched: set[tuple[str, int]] = field(default_factory=set)  # (request, response position)
    first_logprob: TokenDifference | None = None
    first_logit: LogitDifference | None = None
    first_draw: DrawDifference | None = None
    first_route: RouteDifference | None = None

    @property
    def exact(self) -> bool:
        """Log-probabilities, logits and draws of all tokens were compared, and nothing differs."""
        different = self.logprobs_different or self.logits_different or self.draws_different or self.routes_different
        fewest = min(self.logprobs_compared, self.logits_compared, self.draws_repeated)
        return not different and 0 < self.tokens <= fewest

    def add_logprobs(self, samples: Sequence[Sample], trainer: Sequence[np.ndarray]) -> None:
        for sample, values in zip(samples, trainer, strict=True):
            result: Comparison = compare([sample], [values])
            self.logprobs_compared += result.tokens_compared
            self.logprobs_different += result.tokens_different
            self.non_finite += result.tokens_nonfinite
            self.max_ulp = max(self.max_ulp, result.max_ulp)
            self.max_abs_logprob_diff = max(self.max_abs_logprob_diff, result.max_abs_logprob_diff)
            self.first_logprob = _earlier(self.first_logprob, result.first)
            equal = sample.logprobs.view(np.int32) == values.view(np.int32)
            where = np.flatnonzero(~equal | ~np.isfinite(sample.logprobs))
            self.unmatched.update((sample.request_id, int(i)) for i in where)

    def add_logits(self, sample: Sample, rollout: Tensor, trainer: Tensor) -> None:
        """Both (R, V) fp32 on one device."""
        self.logits_compared += rollout.numel()
        different = rollout.view(torch.int32) != trainer.view(torch.int32)
        count = int(different.sum())
        if not count:
            return
        self.logits_different += count
        self.max_abs_logit_diff = larger_gap(self.max_abs_logit_diff, float((rollout - trainer).abs().max()))
        rows = different.any(dim=1).nonzero().flatten().tolist()
        self.unmatched.update((sample.request_id, row) for row in rows)
        row, column = rows[0], int(different[rows[0]].nonzero()[0])
        values = float(rollout[row, column]), float(trainer[row, column])
        self.first_logit = _earlier(self.first_logit, LogitDifference(sample.request_id, row, column, *values))

    def add_draws(self, samples: Sequence[Sample], drawn: Redrawn) -> None:
        result = compare_draws(samples, drawn)
        self.draws_repeated += result.redrawn
        self.draws_different += result.different
        self.first_draw = _earlier(self.first_draw, result.first)
        self.unmatched.update(result.where)

    def add_routes(self, samples: Sequence[Sample], trainer: Sequence[np.ndarray] | None) -> None:
        """``trainer``: (R,) int64 of each sample, as ``Sample.route_digests``."""
        result = compare_routes(samples, trainer)
        if result is None:
            return
        self.routes_compared += result.compared
        self.routes_different += result.different
        self.routes_missing += result.missing
        self.first_route = _earlier(self.first_route, result.first)
        for sample, theirs in zip(samples, trainer or ()):
            if sample.route_digests is not None:
                where = np.flatnonzero(sample.route_digests != theirs)
                self.unmatched.update((sample.request_id, int(i)) for i in where)


Difference = TypeVar("Difference", TokenDifference, LogitDifference, DrawDifference, RouteDifference)


def _earlier(known: Difference | None, new: Difference | None) -> Difference | None:
    """The one of the lower (request, position): batches come in random order."""
    found = [one for one in (known, new) if one is not None]
    return min(found, key=lambda one: (one.request_id, one.position), default=None)


class LogitsCapture:
    """Keeps the logits that an engine samples from; give it to ``Engine.observe_logits``."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], Tensor] = {}  # (request seed, position in the sequence) -> (V,)

    def __call__(self, logits: Tensor, sampling: SamplingTensors) -> None:
        rows = logits.clone()  # (S, V)
        for row, key in enumerate(zip(sampling.seed.tolist(), sampling.position.tolist(), strict=True)):
            self._rows[key] = rows[row]

    def of(self, sample: Sample, seed: int) -> Tensor:
        """(R, V): the logits every token of the sample was drawn from."""
        key, start = request_seed(seed, sample.request_id), len(sample.prompt_token_ids)
        return torch.stack([self._rows[key, start + i] for i in range(len(sample.token_ids))])


class Rollout(Protocol):
    """What samples: our engine, or something with these methods of it."""

    def observe_logits(self, observer: Callable[[Tensor, SamplingTensors], None] | None) -> None: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], request_ids: Sequence[str]
    ) -> list[Sample]: ...

    def stats(self) -> dict[str, float]: ...


@torch.no_grad()
def compare_round(
    start: Callable[..., Rollout],
    side: TrainingSide,
    one_round: Round,
    *,
    device: torch.device,
    fused: bool,
    padded: bool,
    unobserved: bool,
    seed: int,
    tally: BitTally,
) -> tuple[list[Sample], dict[str, float]]:
    """Samples one round, rescores it in two random packings and adds to ``tally``; ``start`` makes a rollout of the
    round's settings.

    The first packing compares logits, and the log-probabilities that the sampler's definition gives for them; the
    second compares the log-probabilities of the fused head (or of logits again without ``fused``). With ``unobserved``
    the second is of samples that the engine generated again without an observer: only then does it use CUDA graphs.
    Every token of both is drawn again from the training side's logits of the first.

    Returns the samples and the engine's statistics.
    """
    engine = start(**one_round.engine)
    capture = LogitsCapture()
    engine.observe_logits(capture)
    samples = engine.generate(one_round.prompts, one_round.params, one_round.request_ids)
    tally.tokens += sum(len(sample.token_ids) for sample in samples)
    rng = random.Random(seed)
    again = samples
    if unobserved:
        engine.observe_logits(None)
        again = engine.generate(one_round.prompts, one_round.params, one_round.request_ids)
    redraw = _redraw_of_all(one_round, samples)
    for second, generated in enumerate((samples, again)):
        for indices, batch in _random_batches(rng, generated, padded, device):
            interrupt.check()
            group = [generated[i] for i in indices]
            if second and fused:
                logprobs = side.logprobs(batch)
            else:
                logits = side.logits(batch)
                logprobs = logprobs_of(logits, batch)
                if not second:
                    show_targets(redraw.watch(batch, indices), logits)
                parts = logits.split(batch.response_lengths.tolist())
                for sample, part in zip(group, parts, strict=True):
                    tally.add_logits(sample, capture.of(sample, one_round.engine["seed"]).to(part.device), part)
            lengths, digests = batch.response_lengths.tolist(), digests_of(side, batch)
            tally.add_logprobs(group, [part.numpy() for part in logprobs.cpu().split(lengths)])
            routes = None if digests is None else [part.numpy() for part in digests.cpu().split(lengths)]
            tally.add_routes(group, routes)
    drawn = redraw.take()
    for generated in (samples, again) if unobserved else (samples,):
        tally.add_draws(generated, drawn)
    return samples, engine.stats()


def _redraw_of_all(one_round: Round, samples: Sequence[Sample]) -> Redraw:
    """Repeats every draw of the round."""
    params = dict(zip(one_round.request_ids, one_round.params, strict=True))
    ids = [sample.request_id for sample in samples]
    return Redraw(samples, [draw_settings(params[name], one_round.engine["seed"], name) for name in ids], 1.0)


def _random_batches(
    rng: random.Random, samples: Sequence[Sample], padded: bool, device: torch.device
) -> Iterator[tuple[list[int], PackedBatch]]:
    """The samples in random order, a random few at a time: their indices, and packed."""
    order = rng.sample(range(len(samples)), len(samples))
    while order:
        count = rng.randint(1, _MOST_PER_BATCH)
        indices, order = order[:count], order[count:]
        group = [samples[i] for i in indices]
        sequences = [TokenSequence(s.prompt_token_ids, s.token_ids, s.inv_temperature, s.min_logits) for s in group]
        yield indices, pack_padded(sequences, device) if padded else pack_tokens(sequences, device)
