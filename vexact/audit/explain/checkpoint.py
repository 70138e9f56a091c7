"""`vexact verify --explain`: the first request that verify found different, diagnosed."""

from __future__ import annotations

from pathlib import Path

import torch

from vexact.audit.explain.divergence import Divergence
from vexact.audit.explain.replay import explain
from vexact.audit.verify import VerifyOptions, VerifyReport
from vexact.audit.verify.run import rounds_of
from vexact.models import ModelConfig, load_model
from vexact.rollout import Engine


def check_backend(model_backend: str) -> None:
    """
    Raises:
        ValueError: the training side is not this package's decoder, whose operators could be compared.
    """
    if model_backend != "vexact":
        raise ValueError(
            f"--explain compares operator by operator, for which --model_backend={model_backend} has no counterparts; "
            "use --model_backend=vexact"
        )


def explain_report(options: VerifyOptions, report: VerifyReport, out_path: Path | None = None) -> Divergence | None:
    """Runs the round of the first unequal request again and diagnoses that request; None when every bit was equal.

    Raises:
        ValueError: the training side is not this package's decoder, whose operators could be compared.
    """
    bits = report.bits
    first = bits.first_logprob or bits.first_logit or bits.first_route or bits.first_draw
    if first is None:
        return None
    check_backend(options.model_backend)
    path, dtype = Path(options.model_path), getattr(torch, options.dtype)
    candidates = rounds_of(options, ModelConfig.from_hf_dir(path))
    one_round = next(one for one in candidates if first.request_id in one.request_ids)
    engine = Engine(model=load_model(path, dtype=dtype, device=options.device), **one_round.engine)
    samples = engine.generate(one_round.prompts, one_round.params, one_round.request_ids)
    index = one_round.request_ids.index(first.request_id)
    trainer = load_model(path, dtype=dtype, device=options.device, attn_impl=options.attn_impl)
    return explain(
        engine,
        trainer,
        samples[index],
        out_path,
        sampling_params=one_round.params[index],
        observed=bits.first_logprob,
        model_path=path.resolve(),
    )
