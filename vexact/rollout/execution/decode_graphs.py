"""Decode steps as CUDA graphs: captured on first use, replayed ever after, with the bits of the eager step.

Launching the kernels of a decode step from Python takes longer than running them; a graph is launched at once. What is
captured is the step as it is, padded to the size of the graph. Rows are independent of each other, so padding changes
no bit of a real row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vexact.models.decoder import CausalLM
from vexact.rollout.engine_config import EngineConfig
from vexact.rollout.execution.cuda_capture import Compute, CudaCapture, ran_out_of_memory
from vexact.rollout.execution.decode_buckets import DecodeBuckets, GraphKey, batch_buckets, key_buckets
from vexact.rollout.execution.decode_inputs import DecodeInputs
from vexact.rollout.execution.model_state import ModelState
from vexact.rollout.execution.runner_inputs import RunnerInputs
from vexact.rollout.scheduling.batch import Batch

Capture = Callable[[Compute], Compute]
_SLOW_SECONDS = 0.5
_logger = logging.getLogger(__name__)


class DecodeGraphs:
    """The graphs of one model and its KV cache.

    Args:
        new_capture: makes what turns a computation on fixed tensors into its replay. Called again whenever the graphs
            made so far are dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        buckets: DecodeBuckets,
        *,
        page_size: int,
        num_slots: int,
        device: torch.device,
        new_capture: Callable[[], Capture],
    ) -> None:
        self._buckets = buckets
        self._inputs = DecodeInputs(device, page_size, num_slots)
        self._state = ModelState(model)
        self._new_capture = new_capture
        self._capture: Capture | None = None
        self._replays: dict[GraphKey, Compute] = {}
        self._out_of_memory = self._told_slow = False
        self.num_replays = 0

    def find(self, batch: Batch) -> GraphKey | None:
        """The graph that can run this step; None if it has to run eagerly.

        Graphs run steps in which every sequence gets one token, and nothing watches the model (hooks, dispatch modes,
        operators that are not known to be capturable). A model whose operators were replaced loses its graphs.
        """
        if batch.max_seqlen_q > 1 or not batch.all_rows_sampled or self._out_of_memory:
            return None
        if self._state.changed():
            self._drop()
        if not self._state.replayable():
            return None
        return self._buckets.find(batch.num_tokens, batch.max_seqlen_k)

    def refresh(self) -> None:
        """Drop graphs that read weights where they are no longer. To be called when requests arrive after a pause."""
        if self._state.moved():
            self._drop()

    def load(self, batch: Batch, key: GraphKey) -> RunnerInputs:
        """The step's inputs in the tensors that the graph reads."""
        return self._inputs.load(batch, key)

    def run(self, key: GraphKey, compute: Compute) -> Tensor:
        """Replay the graph of ``key``, which is captured from ``compute`` if there is none.

        ``compute`` must read the tensors that ``load`` returned and give the same result whenever it is run on the
        same inputs. If memory for a capture is short, it is run as it is, and no step is captured any more.
        """
        if key not in self._replays and not self._add(key, compute):
            return compute()
        self.num_replays += 1
        return self._replays[key]()

    def _add(self, key: GraphKey, compute: Compute) -> bool:
        started = time.perf_counter()
        try:
            if self._capture is None:
                self._capture = self._new_capture()
            self._replays[key] = self._capture(compute)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            self._out_of_memory = True
        if self._out_of_memory:
            self._drop()
            _logger.warning(
                "No memory left to capture decode steps of %d sequences as a CUDA graph: decoding goes on without "
                "graphs, and slower. Lower gpu_memory_utilization or max_num_seqs, or set enforce_eager=true.",
                key.batch_size,
            )
            return False
        self._tell(key, time.perf_counter() - started)
        return True

    def _tell(self, key: GraphKey, seconds: float) -> None:
        _logger.debug("Captured a CUDA graph of %d sequences, %d keys, %.2f s", key.batch_size, key.num_keys, seconds)
        if seconds > _SLOW_SECONDS and not self._told_slow:
            self._told_slow = True
            _logger.info(
                "Captured a CUDA graph of decode steps in %.1f s. Each batch size (of %s) is captured at its first "
                "use; enforce_eager=true decodes without graphs.",
                seconds,
                ", ".join(map(str, self._buckets.batch_sizes)),
            )

    def _drop(self) -> None:
        self._replays.clear()
        self._capture = None


def decode_graphs(
    model: CausalLM, config: EngineConfig, *, max_model_len: int, device: torch.device
) -> DecodeGraphs | None:
    """The graphs of an engine; None where there are none to be had, on CPU or with ``enforce_eager``."""
    if device.type != "cuda" or config.enforce_eager:
        return None
    most = min(config.max_num_seqs, config.max_num_batched_tokens)
    buckets = DecodeBuckets(
        batch_buckets(most, config.cudagraph_capture_sizes), key_buckets(_attention_chunk(model), max_model_len)
    )
    return DecodeGraphs(
        model,
        buckets,
        page_size=config.page_size,
        num_slots=config.max_num_seqs,
        device=device,
        new_capture=lambda: CudaCapture(device),
    )


def _attention_chunk(model: CausalLM) -> int:
    """Keys that one program of the decode attention walks."""
    from vexact.ops.kernels.attention.launch import KEY_BLOCKS, HeadShape  # Triton, which the CPU does without

    config = model.config
    heads = config.num_heads, config.num_kv_heads, config.key_dim, config.value_dim
    return KEY_BLOCKS[HeadShape(*heads, model.lm_head_weight.element_size()).key].chunk
