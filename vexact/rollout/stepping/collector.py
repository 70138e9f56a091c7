"""What the tokens of a step do to its requests: each gets its own, some end, and one without a number is dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from vexact.models.decoder import CausalLM
from vexact.models.nonfinite import cause_of_nonfinite
from vexact.rollout.requests.finish import Ending, Finisher
from vexact.rollout.requests.intake import Intake
from vexact.rollout.requests.request import Request
from vexact.rollout.sampling.sampler import NonFiniteLogprobError, StepOutput
from vexact.rollout.scheduling.scheduler import Scheduler
from vexact.rollout.scheduling.state import SlotState
from vexact.types import Sample

TokenObserver = Callable[[Sequence[str], StepOutput], None]


class Collector:
    """Takes tokens in, and requests out of the engine."""

    def __init__(
        self, model: CausalLM, state: SlotState, scheduler: Scheduler, intake: Intake, finisher: Finisher
    ) -> None:
        self._model = model
        self._state = state
        self._scheduler = scheduler
        self._intake = intake
        self._finisher = finisher
        self.weights_version = 0  # that samples are said to come from
        self.on_tokens: TokenObserver | None = None

    def collect(self, slots: np.ndarray, output: StepOutput) -> list[Sample]:
        """One sampled token for each of ``slots`` (S,); returns the samples that ended with it.

        Raises:
            NonFiniteLogprobError: a log-probability is NaN or infinite. Its request is dropped, the others go on.
        """
        finite = output.finite()
        if finite.all():
            return self._append(slots, output)
        message, request_ids = self._drop_nonfinite(slots[~finite], output.rows(~finite))
        raise NonFiniteLogprobError(message, request_ids, self._append(slots[finite], output.rows(finite)))

    def end(self, request: Request, ending: Ending) -> Sample:
        """Takes the request out, wherever it is; what it has got so far is its sample."""
        self._drop(request)
        return self._finisher.sample(request, ending, self.weights_version)

    def unbegun(self, request: Request, ending: Ending) -> Sample:
        """The sample, without a token, of a request that never came here."""
        return self._finisher.sample(request, ending, self.weights_version)

    def _append(self, slots: np.ndarray, output: StepOutput) -> list[Sample]:
        self._state.append_sampled(slots, *output)
        if self.on_tokens is not None:
            self.on_tokens([self._state.request(slot).request_id for slot in slots.tolist()], output)
        endings = self._finisher.endings(slots, output.token_ids)
        return [self.end(self._state.request(slot), ending) for slot, ending in endings]

    def _drop_nonfinite(self, slots: np.ndarray, output: StepOutput) -> tuple[str, list[str]]:
        """Takes the requests in ``slots`` out; returns what to say about them, and their ids."""
        model, requests = self._model, [self._state.request(slot) for slot in slots.tolist()]
        first, position = requests[0], int(self._state.num_known(slots[0])) - requests[0].num_prompt_tokens
        for request in requests:
            self._drop(request)
        tensors = chain(model.named_parameters(), model.named_buffers())
        cause = cause_of_nonfinite(tensors, model.lm_head_weight.dtype)
        return output.describe_nonfinite(first.request_id, position) + cause, [one.request_id for one in requests]

    def _drop(self, request: Request) -> None:
        self._scheduler.release(request)
        self._intake.forget(request)
