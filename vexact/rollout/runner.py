"""Runs the model on a batch. ``prepare`` moves data, ``execute`` computes: a captured graph replaces the latter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.models.decoder import CausalLM
from vexact.ops.attention.metadata import PagedMetadata
from vexact.ops.sampling import SamplingTensors
from vexact.rollout.batch import Batch
from vexact.rollout.sampler import StepOutput, sample_tokens, to_host
from vexact.rollout.staging import StagingBuffer

_STAGED = (
    "input_ids",
    "positions",
    "slot_mapping",
    "cu_seqlens_q",
    "seqused_k",
    "block_table",
    "sample_rows",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "sample_positions",
)


@dataclass(frozen=True, slots=True, eq=False)
class RunnerInputs:
    """One step's inputs on the device."""

    input_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    attention: PagedMetadata
    sample_rows: Tensor | None  # (S,) int64; None: every row is sampled
    num_sampled: int
    sampling: SamplingTensors  # each (S,)


class ModelRunner:
    """Owns the KV cache of one model."""

    def __init__(self, model: CausalLM, *, num_pages: int, page_size: int, device: torch.device) -> None:
        self._model = model
        self._device = device
        self.on_logits: Callable[[Tensor, SamplingTensors], None] | None = None  # sees (S, V) fp32 before sampling
        self._staging = StagingBuffer(device) if device.type == "cuda" else None
        self.kv_caches = allocate_kv_caches(model, num_pages=num_pages, page_size=page_size, device=device)
        # may replace what was sampled, so that a diagnosis can force recorded tokens
        self.on_sampled: Callable[[Tensor, SamplingTensors, Tensor], Tensor] | None = None

    def prepare(self, batch: Batch) -> RunnerInputs:
        """Batch to device tensors: one copy on CUDA, none on CPU."""
        arrays = {name: getattr(batch, name) for name in _STAGED}
        if self._staging is None:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        else:
            tensors = self._staging.upload(arrays)
        attention = PagedMetadata(
            cu_seqlens_q=tensors["cu_seqlens_q"],
            seqused_k=tensors["seqused_k"],
            block_table=tensors["block_table"],
            slot_mapping=tensors["slot_mapping"],
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_k,
        )
        sampling = SamplingTensors(
            temperature=tensors["temperature"],
            top_k=tensors["top_k"],
            top_p=tensors["top_p"],
            min_p=tensors["min_p"],
            seed=tensors["seed"],
            position=tensors["sample_positions"],
        )
        rows = None if batch.all_rows_sampled else tensors["sample_rows"]
        return RunnerInputs(
            tensors["input_ids"], tensors["positions"], attention, rows, len(batch.sample_rows), sampling
        )

    @torch.inference_mode()
    def execute(self, inputs: RunnerInputs) -> StepOutput | None:
        """Forward pass, then sampling of the complete sequences; None if the step only filled the cache."""
        hidden = self._model(inputs.input_ids, inputs.positions, inputs.attention, self.kv_caches)  # (T, H)
        if not inputs.num_sampled:
            return None
        if inputs.sample_rows is not None:
            hidden = hidden[inputs.sample_rows]  # (S, H)
        logits = self._model.logits(hidden)  # (S, V)
        if self.on_logits is not None:
            self.on_logits(logits, inputs.sampling)
        sampled = sample_tokens(logits, inputs.sampling)
        if self.on_sampled is not None:
            sampled = self.on_sampled(logits, inputs.sampling, sampled)
        return to_host(sampled)


def kv_page_bytes(model: CausalLM, page_size: int) -> int:
    """Bytes of keys and values of one page over all layers."""
    config = model.config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * page_size * model.lm_head_weight.element_size()


def allocate_kv_caches(
    model: CausalLM, *, num_pages: int, page_size: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Per layer, zeroed keys and values (num_pages, page_size, Hkv, D) in the model's dtype.

    Zeroed because attention may multiply a masked position's value by a weight of 0, and 0 * NaN is NaN.
    """
    config = model.config
    shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
    dtype = model.lm_head_weight.dtype
    return [
        (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(config.num_layers)
    ]
