"""A self-test of the loaded engine and actor before the first step, kept with the run and its checkpoints."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from vexact.audit.compare import Comparison, compare
from vexact.audit.draws import DrawComparison, compare_draws
from vexact.audit.environment import kernel_constants, tile_table_hash
from vexact.rollout import SamplingParams
from vexact.rollout.protocol import RolloutEngine
from vexact.rollout.requests.request import draw_settings
from vexact.training.passes.redraw import Redraw
from vexact.training.protocol import Policy
from vexact.types import Sample, TrainSequence

log = logging.getLogger(__name__)
FILE = "certificate.json"
_PROMPT_LENGTHS = (1, 17, 33, 65, 100)  # across pages and key blocks
_NEW_TOKENS = 8
_SAMPLING = ((1.0, -1, 1.0), (0.7, -1, 1.0), (0.0, -1, 1.0), (1.0, 20, 0.9), (1.0, -1, 1.0))
"""(temperature, top_k, top_p) of each prompt."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was sampled, how, and how it compared with the actor."""

    samples: list[Sample]
    params: list[SamplingParams]
    comparison: Comparison
    draws: DrawComparison

    @property
    def exact(self) -> bool:
        """Every token was compared and drawn again, and nothing differs."""
        compared = self.comparison.tokens_compared
        return self.comparison.exact and not self.draws.different and self.draws.redrawn >= compared

    def first_different(self) -> tuple[Sample, SamplingParams]:
        """The request of the first log-probability or route that differs."""
        name = self.comparison.first_request
        assert name is not None, "no log-probability and no route differs"
        pairs = zip(self.samples, self.params, strict=True)
        return next(pair for pair in pairs if pair[0].request_id == name)


class CertificateError(RuntimeError):
    """The self-test found rollout and trainer to disagree before the first step; ``self_test`` says where."""

    def __init__(self, message: str, self_test: SelfTest) -> None:
        super().__init__(message)
        self.self_test, self.comparison = self_test, self_test.comparison

    def __reduce__(self) -> tuple[type[CertificateError], tuple[str, SelfTest]]:
        return CertificateError, (str(self), self.self_test)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the self-test compared, and on what."""

    exact: bool
    comparison: Comparison
    draws: DrawComparison
    rollout_attention: str
    trainer_attention: str
    dtype: str
    weights_version: int
    environment: dict[str, object]  # versions, device, threads
    tile_table: str  # hash of the kernel constants
    kernel_constants: dict[str, str]  # the same by kind of kernel: attention, linear, moe, …
    seconds: float

    def to_json(self) -> str:
        """JSON has no NaN and no infinity: they are written as text."""
        return json.dumps(plain(asdict(self)), indent=2, allow_nan=False) + "\n"

    def describe(self) -> str:
        """One line for the log."""
        c, draws = self.comparison, self.draws
        pair = f"{self.rollout_attention} (rollout) and {self.trainer_attention} (trainer)"
        if self.exact:
            experts = "" if c.routes is None else f", experts equal for {c.routes.compared} tokens"
            return (
                f"self-test: {c.tokens_compared} log-probabilities equal bit for bit{experts}, {draws.redrawn} draws "
                "repeated, "
                f"attention {pair}"
            )
        if not c.exact or draws.different:
            found = draws.describe() if c.exact else c.describe()
        else:
            found = f"{draws.redrawn} of {c.tokens_compared} draws were repeated"
        return (
            f"the self-test before the first step failed: {found}. Attention "
            f"is {pair}; `vexact verify` looks closer; trainer.exactness=warn logs this and goes on"
        )


def run_self_test(
    engine: RolloutEngine, actor: Policy, while_scoring: Callable[[], AbstractContextManager[None]] = nullcontext
) -> SelfTest:
    """Samples random prompts on every replica, rescores and redraws every token with the actor, compares the bits.

    The engine and the actor are left as they were: request ids are the self-test's own, the engine's statistics and
    prefix cache are cleared, no weight changes. Both must hold the same weights and be idle.

    Args:
        while_scoring: entered while the actor computes and the engine does not.
    """
    prompts, params = _requests(engine, actor.config.max_micro_batch_tokens)
    samples = engine.generate(prompts, params, [f"certificate/{index}" for index in range(len(prompts))])
    nothing = [np.zeros(len(sample.token_ids), np.float32) for sample in samples]
    settings = [draw_settings(one, engine.seed, sample.request_id) for one, sample in zip(params, samples, strict=True)]
    redraw = Redraw(samples, settings, 1.0)
    with while_scoring():
        trained = actor.rescore([TrainSequence(*pair) for pair in zip(samples, nothing, strict=True)], redraw)
    engine.clear_prefix_cache()
    engine.stats()
    return SelfTest(
        samples, params, compare(samples, trained.logprobs, trained.routes), compare_draws(samples, redraw.take())
    )


def _requests(engine: RolloutEngine, token_budget: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts as long as engine and actor allow, and how to sample from them."""
    most = min(engine.max_model_len, engine.num_cache_tokens, token_budget)
    new = max(1, min(_NEW_TOKENS, most // 2))
    rng = random.Random(0)
    vocab_size = engine.vocab_size
    lengths = [max(1, min(length, most - new)) for length in _PROMPT_LENGTHS]
    params = [
        SamplingParams(max_tokens=new, temperature=t, top_k=k, top_p=p, seed=0, ignore_eos=True)
        for t, k, p in _SAMPLING
    ]
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return prompts * engine.num_replicas, params * engine.num_replicas


def plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: they are text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(certificate: Certificate, run_dir: Path) -> None:
    """Writes ``certificate.json``, which every checkpoint copies."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FILE).write_text(certificate.to_json())


def require_certificate(
    engine: RolloutEngine,
    actor: Policy,
    run_dir: Path,
    exactness: str,
    *,
    rollout_attention: str,
    trainer_attention: str,
    environment: dict[str, object],
    while_scoring: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Runs the self-test as ``trainer.exactness`` says: ``strict`` stops, ``warn`` logs, ``off`` skips it.

    Raises:
        CertificateError: a bit or a draw differs and exactness is strict. The certificate is written all the same.
        NonFiniteLogprobError: the engine sampled a token without a log-probability. There is no certificate then.
    """
    (run_dir / FILE).unlink(missing_ok=True)  # of an earlier start in this directory
    if exactness == "off":
        return
    started = perf_counter()
    result = run_self_test(engine, actor, while_scoring)
    certificate = Certificate(
        exact=result.exact,
        comparison=result.comparison,
        draws=result.draws,
        rollout_attention=rollout_attention,
        trainer_attention=trainer_attention,
        dtype=actor.config.dtype,
        weights_version=engine.weights_version,
        environment=environment,
        tile_table=tile_table_hash(),
        kernel_constants=kernel_constants(),
        seconds=perf_counter() - started,
    )
    write(certificate, run_dir)
    if certificate.exact:
        log.info("%s (%.1f s)", certificate.describe(), certificate.seconds)
    elif exactness == "strict":
        raise CertificateError(certificate.describe(), result)
    else:
        log.warning("%s", certificate.describe())
