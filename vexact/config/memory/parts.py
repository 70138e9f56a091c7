"""Bytes of every part of a trainer and of a rollout engine on one GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vexact.config.memory.kv_cache import BYTES, kv_cache_tokens, page_bytes, pages_per_sequence, useful_pages
from vexact.config.memory.model_shape import ModelShape
from vexact.config.memory.placement import Placement
from vexact.config.schema import Config

GIB, MIB = 1 << 30, 1 << 20
OFFLOAD_BYTES = 512 * MIB  # moments on their way through the GPU
HEAD_WORKSPACE_BYTES = 1280 * MIB  # of the fused cross-entropy's kernels
ONE_PASS_HEAD_BYTES = 3 << 29  # a head whose fp32 gradient is no larger is accumulated in one pass
GRAPH_BYTES = GIB // 2  # private pools of CUDA graphs
SLOT_BYTES_PER_TOKEN = 16  # an id and two float32 numbers, in the rollout's state
KV_CACHE = "key-value cache"

Stage = Literal["generation", "update", "sync"]


@dataclass(frozen=True, slots=True)
class Parts:
    """Sizes for one configuration; ``device`` is "cpu" or "cuda"."""

    config: Config
    shape: ModelShape
    placement: Placement
    device: str

    def training(self, stage: Stage) -> dict[str, int]:
        """Of one trainer. Gradients stay until the next update begins."""
        moments = 8 * self._share
        if self.offloads_moments:
            moments = min(moments, OFFLOAD_BYTES) if stage == "update" else 0
        parts = {
            "master weights": 0 if self.offloads_weights and stage == "generation" else 4 * self._share,
            "gradients": 4 * self._share,
            "moments": moments,
            "reference": self._width * self._share if self.config.needs_reference else 0,
        }
        if stage == "update":
            parts |= {"gathered layers": self._gathered(), "activations": self._activations()}
        return parts

    def rollout(self, stage: Stage, *, trains: bool) -> dict[str, int]:
        """Of one replica; beside a trainer (``trains``) its cache may be away while there is no generation."""
        parts = {"rollout weights": self._width * self.shape.num_parameters}
        if stage == "generation":
            parts["rollout workspace"] = self._workspace()
        if stage == "generation" or not (trains and self._releases_cache):
            fixed = self.fixed_kv_cache
            parts[KV_CACHE] = self.least_kv_cache if fixed is None else fixed
        return parts

    @property
    def host(self) -> int:
        """What one trainer keeps in the memory of its machine."""
        return 4 * self._share * self.offloads_weights + 8 * self._share * self.offloads_moments

    @property
    def offloads_weights(self) -> bool:
        return self.device == "cuda" and self.config.actor.fsdp_config.param_offload

    @property
    def offloads_moments(self) -> bool:
        return self.device == "cuda" and self.config.actor.fsdp_config.optimizer_offload

    @property
    def least_kv_cache(self) -> int:
        """One sequence of full length."""
        return pages_per_sequence(self.config) * self._page_bytes

    @property
    def fixed_kv_cache(self) -> int | None:
        """Where a key or the device says it; None where ``gpu_memory_utilization`` decides."""
        tokens = kv_cache_tokens(self.config, self.device, self.shape)
        return None if tokens is None else tokens // self.config.rollout.page_size * self._page_bytes

    def wanted_kv_cache(self, device_bytes: int) -> int:
        """What ``gpu_memory_utilization`` takes of the memory that is free beside the rollout's weights."""
        free = max(0, device_bytes - self._width * self.shape.num_parameters)
        pages = int(free * self.config.rollout.gpu_memory_utilization) // self._page_bytes
        return useful_pages(self.config, pages) * self._page_bytes

    @property
    def _page_bytes(self) -> int:
        return page_bytes(self.config, self.device, self.shape)

    @property
    def _width(self) -> int:
        """Bytes of a number of the compute type."""
        return BYTES[self.config.dtype(self.device)]

    @property
    def _share(self) -> int:
        """Parameters of one trainer."""
        return -(-self.shape.num_parameters // self.placement.trainers)

    @property
    def _releases_cache(self) -> bool:
        return self.device == "cuda" and self.config.rollout.free_cache_engine

    def _gathered(self) -> int:
        """Whole weights of the root and of two layers, and the gradients of the largest of them before they are shared;
        nothing where FSDP is not needed."""
        if self.placement.trainers == 1 and self._width == 4:
            return 0
        layer, root = self.shape.layer_parameters, self.shape.root_parameters
        sent_and_received = 8 if self.placement.trainers > 1 else 4  # fp32
        return self._width * (root + 2 * layer) + (self._width + sent_and_received) * max(layer, root)

    def _activations(self) -> int:
        """What a forward of a full token budget keeps for its backward."""
        tokens = self.config.actor.ppo_max_token_len_per_gpu
        return tokens * self._activation_bytes_per_token() + self._head(tokens)

    def _activation_bytes_per_token(self) -> int:
        """A layer keeps the inputs of its norms and products, queries, keys, values, attention's output, and fp32
        statistics of rows and heads. A layer that is recomputed keeps the two streams that enter it."""
        shape, width = self.shape, self._width
        heads, kv_heads, hidden, wide = shape.num_heads, shape.num_kv_heads, shape.hidden_size, shape.intermediate_size
        kept = width * (4 * hidden + 3 * (heads + kv_heads) * shape.head_dim + 3 * wide)
        kept += 4 * (2 + 2 * heads + kv_heads)
        passing = width * (4 * hidden + 3 * wide)  # gradients of the layer that the backward is in
        if self.config.model.enable_gradient_checkpointing:
            return shape.num_layers * 2 * hidden * width + kept + passing
        return shape.num_layers * kept + passing

    def _head(self, tokens: int) -> int:
        """Rows that predict a token, twice, and their gradients; the head's fp32 gradient; pieces of the logits."""
        shape = self.shape
        gradient = 4 * shape.vocab_size * shape.hidden_size
        accumulator = gradient if gradient <= ONE_PASS_HEAD_BYTES and self.config.actor.entropy_coeff == 0 else 0
        logits = tokens * shape.vocab_size * (4 + self._width)
        return 3 * tokens * shape.hidden_size * self._width + accumulator + min(logits, HEAD_WORKSPACE_BYTES)

    def _workspace(self) -> int:
        """One forward of the engine, its logits, the state of its requests and its CUDA graphs."""
        rollout, shape = self.config.rollout, self.shape
        qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        forward = self._width * (4 * shape.hidden_size + 2 * qkv + 3 * shape.intermediate_size)
        logits = 3 * 4 * shape.vocab_size  # as they are, scaled, and their noise
        state = self.config.max_model_len * SLOT_BYTES_PER_TOKEN
        graphs = GRAPH_BYTES if self.device == "cuda" and not rollout.enforce_eager else 0
        return rollout.max_num_batched_tokens * forward + rollout.max_num_seqs * (logits + state) + graphs
