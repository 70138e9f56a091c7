"""Runs the model on a batch. ``prepare`` moves data, ``execute`` computes, or replays a captured computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from vexact.models.decoder import CausalLM, KVCache
from vexact.models.layers import Routing
from vexact.ops.sampling import SamplingTensors
from vexact.rollout.execution.decode_graphs import DecodeGraphs
from vexact.rollout.execution.lent_memory import KV_CACHE, LentMemory, ends
from vexact.rollout.execution.readback import PendingOutput, Readback
from vexact.rollout.execution.runner_inputs import RunnerInputs
from vexact.rollout.execution.staging import StagingBuffer
from vexact.rollout.execution.token_feed import TokenFeed
from vexact.rollout.sampling.sampler import sample_tokens
from vexact.rollout.scheduling.batch import Batch

_STAGED = (
    "input_ids",
    "token_sources",
    "positions",
    "slot_mapping",
    "cu_seqlens_q",
    "seqused_k",
    "block_table",
    "sample_rows",
    "sample_slots",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "sample_positions",
)


class ModelRunner:
    """Owns the KV cache of one model."""

    def __init__(
        self,
        model: CausalLM,
        *,
        num_pages: int,
        page_size: int,
        num_slots: int,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model, self._chooses_experts = model, model.chooses_experts
        self._device = device
        self.graphs = graphs  # None: every step runs eagerly
        self.on_logits: Callable[[Tensor, SamplingTensors], None] | None = None  # sees (S, V) fp32 before sampling
        self._staging = StagingBuffer(device) if device.type == "cuda" else None
        self._feed = TokenFeed(num_slots, device)
        self._readback = Readback(device)
        self._kv_memory, self._kv_caches = allocate_kv_caches(
            model, num_pages=num_pages, page_size=page_size, device=device
        )
        # may replace what was sampled, so that a diagnosis can force recorded tokens
        self.on_sampled: Callable[[Tensor, SamplingTensors, Tensor], Tensor] | None = None

    @property
    def kv_caches(self) -> list[KVCache]:
        """Per layer, keys (num_pages, page_size, Hkv, D) and values (..., Dv). Raises RuntimeError while released."""
        if self._kv_memory.released:
            raise RuntimeError("the KV cache is released; resume_kv_cache() first")
        return self._kv_caches

    @property
    def kv_released(self) -> bool:
        return self._kv_memory.released

    def release_kv(self) -> None:
        """Gives the cache's physical memory back; see ``LentMemory.release``."""
        self._kv_memory.release()

    def resume_kv(self) -> None:
        """The cache again, zeroed, where graphs expect it; see ``LentMemory.resume``."""
        self._kv_memory.resume()

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants to see every sampled row, and none that nobody asked for."""
        return self.on_logits is not None or self.on_sampled is not None

    def prepare(self, batch: Batch) -> RunnerInputs:
        """Batch to device tensors: one copy on CUDA, none on CPU."""
        if self.graphs is not None and not self.is_watched:
            key = self.graphs.find(batch)
            if key is not None:
                return self.graphs.load(batch, key)
        arrays = {name: getattr(batch, name) for name in _STAGED}
        if self._staging is None:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        else:
            tensors = self._staging.upload(arrays)
        return RunnerInputs.of(
            tensors,
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_k,
            num_sampled=len(batch.sample_rows),
            all_rows_sampled=batch.all_rows_sampled,
        )

    @torch.inference_mode()
    def execute(self, inputs: RunnerInputs) -> PendingOutput | None:
        """Launch the forward pass, then sampling of the complete sequences; None if the step only fills the cache."""
        if inputs.graph is not None:
            assert self.graphs is not None
            sampled = self.graphs.run(inputs.graph, lambda: self._sampled(inputs, *self._forward(inputs)))
        else:
            hidden, digest = self._forward(inputs)
            if not inputs.num_sampled:
                return None
            sampled = self._sampled(inputs, hidden, digest)
        count = inputs.num_sampled
        self._feed.keep(inputs.sample_slots[:count], sampled[0, :count])
        return self._readback.start(sampled, count)

    def refresh(self) -> None:
        """Notice a model whose weights moved to other memory while nothing ran."""
        if self.graphs is not None:
            self.graphs.refresh()

    def take_num_replays(self) -> int:
        """How many steps graphs have run since the last call."""
        if self.graphs is None:
            return 0
        taken, self.graphs.num_replays = self.graphs.num_replays, 0
        return taken

    def _forward(self, inputs: RunnerInputs) -> tuple[Tensor, Tensor | None]:
        """Hidden states (T, H), and what experts each token chose, (T,) int64, if there are any."""
        input_ids = self._feed.fill(inputs.input_ids, inputs.token_sources)
        args = input_ids, inputs.positions, inputs.attention, self.kv_caches
        if not self._chooses_experts:
            return self._model(*args), None
        digest = torch.zeros_like(inputs.input_ids)
        padded = inputs.graph is not None and inputs.graph.batch_size > 1
        routing = Routing(padding=inputs.attention.seqused_k == 0) if padded else None
        return self._model(*args, route_digest=digest, routing=routing), digest

    def _sampled(self, inputs: RunnerInputs, hidden: Tensor, digest: Tensor | None) -> Tensor:
        """(3, S) or with a digest (5, S) int32, see ``sample_tokens``."""
        if inputs.sample_rows is not None:
            hidden = hidden[inputs.sample_rows]  # (S, H)
            digest = None if digest is None else digest[inputs.sample_rows]
        logits = self._model.logits(hidden)  # (S, V)
        if self.on_logits is not None:
            self.on_logits(logits, inputs.sampling)
        sampled = sample_tokens(logits, inputs.sampling, digest)
        if self.on_sampled is not None:
            sampled = self.on_sampled(logits, inputs.sampling, sampled)
        return sampled


def kv_page_bytes(model: CausalLM, page_size: int) -> int:
    """Bytes of keys and values of one page over all layers."""
    config = model.config
    per_token = config.num_layers * config.num_kv_heads * (config.key_dim + config.value_dim)
    return per_token * page_size * model.lm_head_weight.element_size()


def allocate_kv_caches(
    model: CausalLM, *, num_pages: int, page_size: int, device: torch.device
) -> tuple[LentMemory, list[KVCache]]:
    """Per layer, zeroed keys (num_pages, page_size, Hkv, D) and values (num_pages, page_size, Hkv, Dv) in the model's
    dtype; and the memory of all.

    Zeroed because attention may multiply a masked position's value by a weight of 0, and 0 * NaN is NaN.
    """
    config = model.config
    dtype = model.lm_head_weight.dtype
    shapes = [(num_pages, page_size, config.num_kv_heads, width) for width in (config.key_dim, config.value_dim)]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes] * config.num_layers
    stops = ends(sizes)
    memory = LentMemory(stops[-1], device, KV_CACHE)
    tensors = [
        memory.bytes[start : start + size].view(dtype).view(shape)
        for start, size, shape in zip([0, *stops], sizes, cycle(shapes))
    ]
    return memory, list(zip(tensors[::2], tensors[1::2], strict=True))
