"""The rollout engine: continuous batching over a paged KV cache, with bits that no knob can change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vexact import interrupt
from vexact.models.decoder import CausalLM
from vexact.ops.sampling import SamplingTensors
from vexact.rollout.assembly import assemble
from vexact.rollout.engine_config import EngineConfig
from vexact.rollout.loading import load
from vexact.rollout.requests.finish import Ending
from vexact.rollout.requests.intake import expand
from vexact.rollout.requests.request import requests_of
from vexact.rollout.requests.stop_strings import Tokenizer
from vexact.rollout.sampling.sampler import NonFiniteLogprobError
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.rollout.stats import EngineStats
from vexact.rollout.stepping.collector import TokenObserver
from vexact.rollout.weights import copy_weights
from vexact.types import Sample

INVALID_VERSION = -1


class Engine:
    """Generates samples whose log-probabilities are, bit for bit, those of the training forward.

    A request's tokens and log-probabilities depend on the weights, its prompt, its parameters, the sampling seed and
    its request id, and on nothing else: not on batch mates, page size, chunking, caching, preemption or arrival order.

    Example::

        engine = Engine("path/to/model", max_num_seqs=64)
        samples = engine.generate([[1, 2, 3]], SamplingParams(n=4, max_tokens=32))
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        model: CausalLM | None = None,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        read_weights: bool = True,
        **config: Any,
    ) -> None:
        """Either ``model_path`` (a Hugging Face directory) or a ready ``model``; ``config`` are EngineConfig fields.

        ``eos_token_ids``: tokens that end a response. Default: those of the generation config (else the model config)
        and the tokenizer's end-of-sequence token. ``read_weights``: False leaves them to the first update, which needs
        ``enable_sleep_mode``.

        Raises ValueError for a bad field, or if the KV cache cannot hold one page.
        """
        loaded = load(
            model_path,
            EngineConfig(**config),
            model=model,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            dtype=dtype,
            device=device,
            read_weights=read_weights,
        )
        self.config, self.model, self.weights = loaded.config, loaded.model, loaded.weights
        self.attention, self._own_attention = loaded.attention, loaded.own_attention  # the name of what runs
        self.tokenizer, self.eos_token_ids = loaded.tokenizer, loaded.eos_token_ids
        self.seed, self.vocab_size, self.num_replicas = self.config.seed, self.model.config.vocab_size, 1
        parts = assemble(loaded)
        self.max_model_len, self.num_pages = parts.max_model_len, parts.num_pages
        self._intake, self._scheduler, self._state = parts.intake, parts.scheduler, parts.state
        self._blocks, self._runner = parts.blocks, parts.runner
        self._stepper, self._collector = parts.stepper, parts.collector

    @property
    def weights_version(self) -> int:
        """Of the weights that it generates with; ``INVALID_VERSION`` after an update that failed half way."""
        return self._collector.weights_version

    @weights_version.setter
    def weights_version(self, version: int) -> None:
        self._collector.weights_version = version

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that the key-value cache holds."""
        return self.num_pages * self.config.page_size

    @property
    def has_unfinished(self) -> bool:
        return self._scheduler.has_unfinished

    @property
    def num_requests(self) -> tuple[int, int]:
        """Unfinished requests: those that hold a slot, and those that wait for one."""
        return self._scheduler.num_running, self._scheduler.num_waiting

    @property
    def unfinished_ids(self) -> set[str]:
        """Of the samples that were asked for and have not ended."""
        return {request.request_id for request in self._scheduler.unfinished}

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        draw_id: str | None = None,
    ) -> list[str]:
        """Queue one prompt; returns the ids of its n samples (the request's own id if n is 1, else ``id/0 .. id/n-1``).

        ``draw_id``: what the tokens depend on instead of ``request_id``; running requests may share one.

        Raises ValueError, naming the value and the knob, for a request that could never run or an id in use. Whatever
        it raises, nothing of the request stays behind.
        """
        self._check_ready()
        if not self.has_unfinished:
            self._stepper.settle()
            self._runner.refresh()
        requests = self._intake.make(prompt_token_ids, sampling_params, request_id, draw_id)
        try:
            for request in requests:
                self._scheduler.add(request)
        except BaseException:
            self._scheduler.withdraw(requests)
            self._intake.forget(*requests)
            raise
        return [request.request_id for request in requests]

    def step(self) -> list[Sample]:
        """Schedule and launch one forward pass and its sampling; returns the samples that ended.

        With ``async_scheduling`` they ended in the step before, which runs while this one is prepared. The first call
        then returns none, and a request that ends by surprise (a stop token or string) gets one token that nobody sees.

        Raises:
            NonFiniteLogprobError: a log-probability is NaN or infinite. Its request is dropped, the others go on: the
                error holds the samples that ended in this step.
        """
        samples = self._stepper.step()
        if samples and not self.has_unfinished:
            self.check_idle()
        return samples

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """Sample every prompt to its end. Returns a flat list, prompt-major, n samples per prompt.

        Args:
            sampling_params: one for all prompts, or one per prompt.
            request_ids: one per prompt; the sampled tokens depend on them. Default: a counter of this engine.
            on_step: called after every step with (samples finished, tokens sampled) so far in this call.

        Raises:
            ValueError: lengths that do not match, or a request that could never run (then none is started).
            RuntimeError: requests added by ``add_request`` are still unfinished.
            NonFiniteLogprobError: a log-probability is NaN or infinite. The call ends; the error names the request and
                holds the samples that were finished.
        """
        if self.has_unfinished:
            raise RuntimeError("generate() needs an idle engine; step() until has_unfinished is False or abort_all()")
        params = expand("sampling_params", sampling_params, len(prompts))
        ids: list[str | None] = expand("request_ids", request_ids, len(prompts))
        order: list[str] = []
        finished: dict[str, Sample] = {}
        num_tokens_before = self._stepper.stats.num_tokens
        try:
            with self._intake.names_taken_back():
                for prompt, prompt_params, request_id in zip(prompts, params, ids):
                    order += self.add_request(prompt, prompt_params, request_id)
            while self.has_unfinished:
                interrupt.check()
                finished.update((sample.request_id, sample) for sample in self.step())
                if on_step is not None:
                    on_step(len(finished), self._stepper.stats.num_tokens - num_tokens_before)
        except NonFiniteLogprobError as error:
            error.samples = [*finished.values(), *error.samples]
            raise
        finally:
            self.abort_all()  # only an error or an interrupt leaves anything to abort
        return [finished[request_id] for request_id in order]

    def abort(self, request_ids: Iterable[str] | None = None, *, by_sample: bool = False) -> list[Sample]:
        """Ends unfinished requests, these or all, where they are; their samples may have no token.

        An id, which may stand alone, is a request's, which ends all of its samples, or a sample's; with ``by_sample``
        a sample's only.
        """
        chosen = requests_of(self._scheduler.unfinished, request_ids, by_sample=by_sample)
        return [self._collector.end(request, Ending("abort")) for request in chosen]

    def abort_unbegun(
        self,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        draw_id: str | None = None,
    ) -> list[Sample]:
        """What ``abort`` would return right after ``add_request``; nothing begins, so weights and cache may be away.

        Raises ValueError as ``add_request``, but for an id in use.
        """
        requests = self._intake.make(prompt_token_ids, sampling_params, request_id, draw_id, claims=False)
        return [self._collector.unbegun(request, Ending("abort")) for request in requests]

    def abort_all(self) -> list[str]:
        """Drop every unfinished request; returns their ids."""
        return [sample.request_id for sample in self.abort()]

    def check_idle(self) -> None:
        """With no request left, every page is free or cached and no slot is held. Raises KVIntegrityError."""
        self._blocks.check_idle(self._state.num_held_slots)

    def clear_prefix_cache(self) -> None:
        """Forget every cached prefix, so that the next requests compute their own. Raises RuntimeError if not idle."""
        self._require_idle("clear_prefix_cache()")
        self._blocks.clear_cache()

    @property
    def kv_cache_released(self) -> bool:
        return self._runner.kv_released

    def release_kv_cache(self) -> None:
        """Give the physical memory of the KV cache back until ``resume_kv_cache()``; captured graphs live on.

        Cached prefixes are forgotten. Does nothing if it is released already. Weights may be updated meanwhile.

        Raises:
            RuntimeError: requests are unfinished; or the GPU cannot bring memory back to the same addresses.
        """
        self._require_idle("release_kv_cache()")
        self._blocks.clear_cache()
        self._runner.release_kv()

    def resume_kv_cache(self) -> None:
        """Take memory for the KV cache again, at the addresses it had. Does nothing if it is not released.

        Raises torch.OutOfMemoryError if others have taken the memory; the cache then stays released.
        """
        self._runner.resume_kv()

    def release_weights(self) -> None:
        """Give the memory of the weights back until an update brings all of them anew; captured graphs live on.

        Does nothing if they are away. Raises RuntimeError: requests are unfinished, or as ``WeightMemory.release``.
        """
        self._require_idle("release_weights()")
        self._blocks.clear_cache()
        self.weights.release(self.weights_version)
        self.weights_version = INVALID_VERSION

    def observe_logits(self, observer: Callable[[Tensor, SamplingTensors], None] | None) -> None:
        """Shows ``observer`` the raw logits (S, V) fp32 of every step before they are sampled; None stops it.

        ``SamplingTensors.seed`` and ``.position`` say which token of which request a row is for.
        """
        self._runner.on_logits = observer

    def observe_tokens(self, observer: TokenObserver | None) -> None:
        """Shows ``observer`` the ids of a step's requests and their tokens before ``step`` returns; None stops it."""
        self._collector.on_tokens = observer

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Overwrite the model's parameters and forget the prefix cache.

        Raises:
            RuntimeError: requests are unfinished; their samples would mix two versions.
            ValueError: names, shapes or dtypes do not match the model; the engine then refuses to generate until an
                update succeeds, because some parameters are new and some old.
        """
        with self.replacing_weights(version) as parameters:
            copy_weights(parameters, named_tensors)

    @contextmanager
    def replacing_weights(self, version: int) -> Iterator[Mapping[str, Tensor]]:
        """Hands out the parameters by name, to be overwritten in place; the engine has ``version`` at the end.

        Cached prefixes are forgotten. Whatever is raised inside leaves an engine that refuses to generate until an
        update succeeds. Raises as ``parameters_to_update``.
        """
        parameters = self.parameters_to_update()
        self.weights_version = INVALID_VERSION
        self._blocks.clear_cache()
        yield parameters
        self.weights.restore()
        self.weights_version = version

    def parameters_to_update(self) -> Mapping[str, Tensor]:
        """By name, in memory that is taken again if it was given back. Raises as ``check_updatable``, and
        torch.OutOfMemoryError if others have taken it."""
        self.check_updatable()
        named = self.weights.resume() if self.weights.released else dict(self.model.named_parameters())
        return {name: parameter.detach() for name, parameter in named.items()}

    def check_updatable(self) -> None:
        """Raises RuntimeError while requests are unfinished: their samples would mix two versions."""
        self._require_idle("update_weights()")

    def _require_idle(self, call: str) -> None:
        if self.has_unfinished:
            raise RuntimeError(f"{call} with unfinished requests: finish them, or abort_all() first")
        self._stepper.settle()

    def _check_ready(self) -> None:
        if self.weights.released:
            raise RuntimeError("the rollout's weights are given back; update the weights before generating")
        if self.weights_version == INVALID_VERSION:
            raise RuntimeError("the last weight update failed half way; update the weights before generating")
        if self.kv_cache_released:
            raise RuntimeError("the KV cache is released; call resume_kv_cache() before generating")

    def stats(self) -> dict[str, float]:
        """``rollout/*`` metrics since the last call."""
        return self.take_stats().metrics()

    def take_stats(self) -> EngineStats:
        """The counters behind ``stats()``, for ``merge_stats`` to add up over replicas. Takes them from the engine."""
        stats, self._stepper.stats = self._stepper.stats, EngineStats()
        stats.own_attention = self._own_attention
        stats.num_pages, stats.num_replays = self.num_pages, self._runner.take_num_replays()
        stats.num_preemptions, stats.num_prefix_queried, stats.num_prefix_hits = self._scheduler.take_counters()
        return stats

    @property
    def num_named(self) -> int:
        """Prompts that this engine has named itself. Replicas that share a stream of them get the same number."""
        return self._intake.num_named

    @num_named.setter
    def num_named(self, count: int) -> None:
        self._intake.num_named = count

    @property
    def num_free_pages(self) -> int:
        """KV pages that requests could take now, those of cached prefixes included; 0 while the cache is released."""
        return 0 if self.kv_cache_released else self._blocks.num_available
