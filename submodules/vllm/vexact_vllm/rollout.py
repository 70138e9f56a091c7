"""vLLM behind the interface of our engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vexact import interrupt
from vexact.config import Config
from vexact.models import ModelConfig
from vexact.rollout import NonFiniteLogprobError, SamplingParams
from vexact.rollout.loading import end_of_sequence_ids
from vexact.rollout.requests.intake import expand
from vexact.rollout.stats import GenerationStats
from vexact.types import Sample
from vexact_vllm import environment
from vexact_vllm.settings import engine_arguments

environment.prepare()
from vllm import LLM  # noqa: E402  (it reads its environment when it is imported)

from vexact_vllm import weights  # noqa: E402
from vexact_vllm.requests import requests_of, sample_of  # noqa: E402

log = logging.getLogger(__name__)
NO_VERSION = -1


class VllmRollout:
    """A ``ForeignRollout``: its samples are of the trainer's weights, its log-probabilities are not the trainer's bits.

    Log-probabilities are those of the temperature that was sampled with, as the trainer computes them, so that the
    mismatch metrics show the difference of arithmetic and nothing else.
    """

    num_replicas = 1

    def __init__(self, config: Config, tokenizer: Any, device: torch.device) -> None:
        """Raises ValueError for a model that cannot be loaded or settings that vLLM refuses."""
        self.model_config = ModelConfig.from_hf_dir(config.model.path)
        self.tokenizer, self.device, self.seed = tokenizer, device, config.rollout_seed
        self.eos_token_ids = end_of_sequence_ids(self.model_config, tokenizer)
        self.vocab_size, self.max_model_len = self.model_config.vocab_size, config.max_model_len
        _check_model(self.model_config, device)
        self.llm = LLM(**engine_arguments(config, device))
        cache = self.llm.llm_engine.vllm_config.cache_config
        self.num_cache_tokens = int(cache.num_gpu_blocks) * int(cache.block_size)
        self._addresses: dict[str, int] = self.llm.apply_model(weights.addresses)[0]
        self._can_sleep = self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode
        self._weights_asleep = self._cache_asleep = False
        self.weights_version = 0
        self._stats = GenerationStats()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str],
    ) -> list[Sample]:
        """As ``vexact.rollout.Engine.generate``. A request's tokens may depend on its batch.

        Raises:
            ValueError: a request that vLLM cannot run.
            RuntimeError: the last weight update failed, or the cache is away.
            NonFiniteLogprobError: a log-probability is NaN or infinite.
        """
        if self.weights_version == NO_VERSION:
            raise RuntimeError("the last weight update failed half way; update the weights before generating")
        if self._cache_asleep:
            raise RuntimeError("the KV cache is released; call resume_kv_cache() before generating")
        params = expand("sampling_params", sampling_params, len(prompts))
        requests = list(requests_of(prompts, params, request_ids, seed=self.seed, eos_token_ids=self.eos_token_ids))
        started, engine = time.perf_counter(), self.llm.llm_engine
        outputs: dict[str, Any] = {}
        try:
            for request in requests:
                engine.add_request(request.name, {"prompt_token_ids": list(request.prompt)}, request.theirs)
            while engine.has_unfinished_requests():
                interrupt.check()
                outputs.update((output.request_id, output) for output in engine.step() if output.finished)
        except BaseException:
            engine.abort_request([request.name for request in requests if request.name not in outputs])
            raise
        self._stats.seconds += time.perf_counter() - started
        samples = [
            sample_of(request, outputs[request.name], self.weights_version, self.tokenizer) for request in requests
        ]
        self._stats.num_tokens += sum(len(sample.token_ids) for sample in samples)
        self._require_finite(samples)
        return samples

    def _require_finite(self, samples: Sequence[Sample]) -> None:
        bad = [sample for sample in samples if not np.isfinite(sample.logprobs).all()]
        if bad:
            position = int(np.flatnonzero(~np.isfinite(bad[0].logprobs))[0])
            raise NonFiniteLogprobError(
                f"request {bad[0].request_id}, response position {position}: vLLM sampled token "
                f"{bad[0].token_ids[position]} with log-probability {bad[0].logprobs[position]}",
                [sample.request_id for sample in bad],
                [sample for sample in samples if np.isfinite(sample.logprobs).all()],
            )

    def stats(self) -> dict[str, float]:
        """``rollout/*`` metrics since the last call."""
        return self.take_stats().metrics()

    def take_stats(self) -> GenerationStats:
        taken, self._stats = self._stats, GenerationStats()
        return taken

    def clear_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()

    def check_updatable(self) -> None:
        """Raises RuntimeError while requests are unfinished."""
        if self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("take_weights() with unfinished requests")

    @torch.no_grad()
    def take_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        """See ``vexact.weights.WeightTaker``. Raises WeightSyncError if a layer does not compute with what was sent."""
        self.check_updatable()
        self.weights_version = NO_VERSION
        started = time.perf_counter()
        sent = list(named_tensors)  # vLLM keeps what it is given until a layer is complete
        if self._weights_asleep:
            self.llm.wake_up(tags=["weights"])
            self._weights_asleep = False
        weights.reload(self.llm, self.model_config, sent)
        reloaded = time.perf_counter()
        self.llm.apply_model(lambda model: weights.prove(model, self.model_config, sent, self._addresses))
        self.weights_version = version
        return {
            "timing_s/weights_copy": reloaded - started,
            "timing_s/weights_check": time.perf_counter() - reloaded,
        }

    def release_kv_cache(self) -> None:
        """On a GPU vLLM sleeps: its cache is given back, its weights go to the host."""
        if self._can_sleep and not self._cache_asleep:
            self.llm.sleep(level=1)
            self._weights_asleep = self._cache_asleep = True

    def resume_kv_cache(self) -> None:
        if self._cache_asleep:
            self.llm.wake_up(tags=["kv_cache"] if not self._weights_asleep else None)
            self._weights_asleep = self._cache_asleep = False

    def close(self) -> None:
        """Gives memory back and ends vLLM's process groups, and with them the default group: nothing may follow."""
        self.llm.llm_engine.engine_core.shutdown()


def _check_model(config: ModelConfig, device: torch.device) -> None:
    """Raises ValueError for a model over which vLLM, or the proof of its weights, would stumble in the first step."""
    if config.moe is not None or config.mla is not None:
        raise ValueError(
            f"actor_rollout_ref.rollout.name=vllm: the proof that vLLM computes with the weights that were sent knows "
            f"dense models only, and the model is a {config.architecture}; use vexact's own rollout"
        )
    if device.type == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        known = CPUAttentionBackend.get_supported_head_sizes()
        if config.head_dim not in known:
            raise ValueError(
                f"actor_rollout_ref.rollout.name=vllm: on a CPU vLLM has attention for head_dim {known} only, and the "
                f"model's is {config.head_dim}"
            )
