"""Our sampling parameters to vLLM's, and its outputs to our samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams as VllmSamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from vexact.rollout import SamplingParams
from vexact.rollout.requests.request import draw_settings
from vexact.rollout.requests.stop_strings import StopStringChecker
from vexact.types import Sample


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to be made."""

    name: str
    prompt: tuple[int, ...]
    ours: SamplingParams
    theirs: VllmSamplingParams


def requests_of(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    names: Sequence[str],
    *,
    seed: int,
    eos_token_ids: Sequence[int],
) -> Iterator[Request]:
    """Prompt-major, n for each prompt, named as our own engine names them."""
    for prompt, ours, name in zip(prompts, params, names, strict=True):
        for index in range(ours.n):
            own = name if ours.n == 1 else f"{name}/{index}"
            yield Request(own, tuple(prompt), ours, _translated(ours, seed, own, eos_token_ids))


def _translated(ours: SamplingParams, seed: int, name: str, eos_token_ids: Sequence[int]) -> VllmSamplingParams:
    stop_ids = tuple(ours.stop_token_ids or ())
    return VllmSamplingParams(
        temperature=ours.temperature,
        top_p=ours.top_p,
        top_k=max(0, ours.top_k),
        min_p=ours.min_p,
        seed=draw_settings(ours, seed, name).seed & (2**63 - 1),
        max_tokens=ours.max_tokens,
        # without a tokenizer vLLM knows no end of sequence: ours are stop tokens like others
        ignore_eos=True,
        stop_token_ids=list(stop_ids if ours.ignore_eos else (*stop_ids, *eos_token_ids)),
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sample_of(request: Request, output: RequestOutput, weights_version: int, tokenizer: Any) -> Sample:
    """A finished request as a sample. Raises RuntimeError for one that vLLM gave up."""
    done = output.outputs[0]
    if done.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {request.name} with {done.finish_reason!r}")
    tokens, ours = tuple(done.token_ids), request.ours
    assert done.logprobs is not None, "they were asked for"
    logprobs = np.array([at[token].logprob for token, at in zip(tokens, done.logprobs, strict=True)], np.float32)
    reason, stop_reason = done.finish_reason, done.stop_reason
    shown = tokens[:-1] if isinstance(stop_reason, int) else tokens
    text = None if tokenizer is None else tokenizer.decode(list(shown), skip_special_tokens=True)
    if ours.stop:
        found = _first_stop_string(tokens, len(shown), tuple(ours.stop), tokenizer)
        if found is not None:
            length, stop_reason, text = found
            tokens, logprobs, reason = tokens[:length], logprobs[:length], "stop"
    truncated = ours.top_p < 1 or ours.top_k > 0 or ours.min_p > 0
    return Sample(
        request_id=request.name,
        prompt_token_ids=request.prompt,
        token_ids=tokens,
        logprobs=logprobs,
        # NaN: nobody knows what was kept, and whoever trained on it would see that
        min_logits=np.full(len(tokens), np.nan if truncated else -np.inf, np.float32),
        temperature=float(np.float32(ours.temperature)),
        finish_reason=reason,
        weights_version=weights_version,
        stop_reason=stop_reason,
        text=text,
    )


def _first_stop_string(
    tokens: Sequence[int], num_shown: int, stop: tuple[str, ...], tokenizer: Any
) -> tuple[int, str, str] | None:
    """(tokens up to and with the stop string, the string, the text before it), as our own engine would have ended.

    vLLM looks for strings with a tokenizer of its own only; what it samples after one is cut off here.
    """
    checker = StopStringChecker(tokenizer, stop)
    for index, token in enumerate(tokens[:num_shown]):
        match = checker.push(token)
        if match is not None:
            return index + 1, match.stop, match.text
    return None
