"""Bytes of every part of a trainer and of a rollout engine on one GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vexact.config.memory.activations import activation_bytes
from vexact.config.memory.kv_cache import BYTES, kv_cache_tokens, page_bytes, pages_per_sequence, useful_pages
from vexact.config.memory.model_shape import ModelShape
from vexact.config.memory.placement import Placement
from vexact.config.schema import Config

GIB, MIB = 1 << 30, 1 << 20
OFFLOAD_BYTES = 256 * MIB  # moments on their way through the GPU
HEAD_WORKSPACE_BYTES = 1280 * MIB  # of the fused cross-entropy's kernels
ONE_PASS_HEAD_BYTES = 3 << 29  # a head whose fp32 gradient is no larger is accumulated in one pass
GRAPH_BYTES = GIB // 2  # private pools of CUDA graphs
KV_CACHE, ROLLOUT_WEIGHTS = "key-value cache", "rollout weights"


def slot_bytes_per_token(shape: ModelShape) -> int:
    """In the rollout's state: an id and two float32 numbers; with experts also a hash of those that were chosen."""
    return 16 if shape.experts is None else 24


Stage = Literal["generation", "update", "sync"]


@dataclass(frozen=True, slots=True)
class Parts:
    """Sizes for one configuration; ``device`` is "cpu" or "cuda"."""

    config: Config
    shape: ModelShape
    placement: Placement
    device: str

    def training(self, stage: Stage) -> dict[str, int]:
        """Of one trainer. Gradients are there during an update only."""
        moments = 8 * self._share
        if self.offloads_moments:
            moments = min(moments, OFFLOAD_BYTES) if stage == "update" else 0
        parts = {
            "master weights": 0 if self.offloads_weights and stage != "update" else 4 * self._share,
            "moments": moments,
            "reference": 0 if self._reference_is_away(stage) else self._width * self._share,
        }
        if stage == "update":
            gradients = {"gradients": 4 * self._share}
            parts |= gradients | {"gathered layers": self._gathered(), "activations": self._activations()}
        return parts

    def rollout(self, stage: Stage, *, trains: bool) -> dict[str, int]:
        """Of one replica; beside a trainer (``trains``) its cache may be away while there is no generation, and in an
        update its weights."""
        asleep = trains and stage == "update" and self.config.rollout.enable_sleep_mode
        parts = {} if asleep else {ROLLOUT_WEIGHTS: self._width * self.shape.num_parameters}
        if stage == "generation":
            parts["rollout workspace"] = self._workspace()
        if stage == "generation" or not (trains and self._releases_cache):
            fixed = self.fixed_kv_cache
            parts[KV_CACHE] = self.least_kv_cache if fixed is None else fixed
        return parts

    @property
    def host(self) -> int:
        """What one trainer keeps in the memory of its machine."""
        moments = 8 * self._share * self.offloads_moments
        on_its_way = 12 * self._share * (self.device == "cuda" and self.config.actor.checkpoint.async_save)
        past = self._num_past_versions  # and the present weights, while earlier ones are in their place
        return self._parked + moments + on_its_way + self._share * (self._width * past + 4 * (past > 0))

    @property
    def host_at_resume(self) -> int:
        """The same while it reads a checkpoint: weights and moments of its own rows, before they go where they belong.
        Offloaded moments are read in place; no checkpoint is on its way yet, and no earlier weights are kept."""
        return self._parked + 12 * self._share if self.device == "cuda" else 0

    @property
    def _parked(self) -> int:
        """Weights that are on the host from the start, the reference's included."""
        reference = self._width * self._share * self._offloads_reference
        return 4 * self._share * self.offloads_weights + reference

    @property
    def _num_past_versions(self) -> int:
        """Copies of earlier weights for the audit; a step's are needed until the one after the next has trained."""
        trainer = self.config.trainer
        if self.device != "cuda" or not trainer.async_steps or trainer.exactness == "off":
            return 0
        return 2 if trainer.async_audit_freq == 1 else int(trainer.async_audit_freq > 1)

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
        """What ``gpu_memory_utilization`` takes of what is free once the weights of both sides are there."""
        weights = self._width * self.shape.num_parameters
        if self.placement.is_colocated:
            parked = self.training("generation")
            weights += parked["master weights"] + parked["reference"]
        free = max(0, device_bytes - weights)
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

    def _reference_is_away(self, stage: Stage) -> bool:
        return not self.config.needs_reference or (self._offloads_reference and stage != "update")

    @property
    def _offloads_reference(self) -> bool:
        return self.device == "cuda" and self.config.needs_reference and self.config.ref.fsdp_config.param_offload

    def _gathered(self) -> int:
        """Whole weights of the root and of two layers, and the gradients of the largest of them before they are shared;
        nothing where FSDP is not needed."""
        if self.placement.trainers == 1 and self._width == 4:
            return 0
        layer = self.shape.largest_layer(0) if self._shares_experts else self.shape.layer_parameters
        root, experts = self.shape.root_parameters, self._shared_experts() if self._shares_experts else 0
        sent_and_received = 8 if self.placement.trainers > 1 else 4  # fp32
        return self._width * (root + 2 * layer) + (self._width + sent_and_received) * max(layer, root) + experts

    @property
    def _shares_experts(self) -> bool:
        return self.shape.experts is not None and self.config.actor.fsdp_config.expert_parallel_size > 1

    def _shared_experts(self) -> int:
        """A group's experts of one layer, or of all that are not computed again. Where ranks make up a group: their
        gradients for every source, and those of one source on their way; a rank that is alone adds them at once."""
        shape, moe = self.shape, self.shape.experts
        assert moe is not None, "asked of a mixture only"
        groups = self.config.actor.fsdp_config.expert_parallel_size
        every = shape.expert_layer_parameters(moe.num_experts) - shape.expert_layer_parameters(0)
        kept = max(1, min(shape.num_expert_layers, shape.num_layers - self._recomputed))
        travelling = every + 2 * -(-every // groups) if groups < self.placement.trainers else 0
        return self._width * (kept * -(-every // groups) + travelling)

    @property
    def _recomputed(self) -> int:
        """Layers that are computed again in the backward."""
        return self.config.model.recomputed_of(self.shape.num_layers)

    def _activations(self) -> int:
        """What one rank's part of a full forward keeps for its backward."""
        tokens, sharing = self.config.actor.ppo_max_token_len_per_gpu, self.config.actor.ulysses_sequence_parallel_size
        layers = activation_bytes(
            self.shape,
            tokens * sharing,
            self._width,
            recomputed=self._recomputed,
            sharing=sharing,
            rows_travel=self._shares_experts,
        )
        return layers + self._head(tokens)

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
        qkv = (shape.num_heads + shape.num_kv_heads) * shape.key_dim + shape.num_kv_heads * shape.value_dim
        moe = shape.experts
        inner = 3 * shape.intermediate_size
        if moe is not None:
            rows = moe.top_k * (3 * moe.intermediate_size + shape.hidden_size)
            inner = max(inner, rows + 3 * moe.shared_intermediate_size)
        forward = self._width * (4 * shape.hidden_size + 2 * qkv + inner)
        logits = 3 * 4 * shape.vocab_size  # as they are, scaled, and their noise
        state = self.config.max_model_len * slot_bytes_per_token(shape)
        graphs = GRAPH_BYTES if self.device == "cuda" and not rollout.enforce_eager else 0
        return rollout.max_num_batched_tokens * forward + rollout.max_num_seqs * (logits + state) + graphs
