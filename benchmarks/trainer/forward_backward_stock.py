"""The same micro-batch by stock operators: a model of transformers, compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from benchmarks.trainer.forward_backward_sides import MicroBatch, gradient
from vexact.models import CausalLM
from vexact.models.hf_names import to_hf
from vexact.ops.linear_cross_entropy import LinearCrossEntropy

ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
HEAD_ROWS = 8192  # rows of logits at a time: their number stays below 2**31, as 32-bit indices need


class Stock:
    """``Qwen3ForCausalLM`` of transformers with the weights of a model of ours: its layers compiled, each as one graph
    for all of them, and so the head, which makes fp32 of its logits. The sum of a branch and the residual stream
    is taken at the start of the next graph, where the compiler fuses it with the norm.
    """

    def __init__(self, model: CausalLM, backend: str, head_rows: int = HEAD_ROWS) -> None:
        """``backend``: of ``torch.compile``."""
        from transformers import AutoConfig, AutoModelForCausalLM

        weight = model.lm_head_weight
        config = AutoConfig.for_model(**copy.deepcopy(dict(model.config.raw)))
        with torch.device(weight.device):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=weight.dtype, attn_implementation="sdpa")
        missing, unexpected = self.model.load_state_dict(dict(to_hf(model.config, model.state_dict().items())), False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"the weights are not those of {type(self.model).__name__}: {missing}, {unexpected}")
        self.model.train()
        compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
        self._layer, self._head, self._head_rows = compiled(_layer), compiled(_head), head_rows

    def forward_backward(self, work: MicroBatch, recompute: bool, attention: str) -> Tensor:
        """Log-probabilities (R,); the gradients are in the model."""
        with _compiling(), sdpa_kernel(ATTENTION[attention]):
            logprobs = self._logprobs(work.tokens, recompute, attention)
            work.loss(LinearCrossEntropy(logprobs, torch.zeros_like(logprobs))).backward()
        return logprobs.detach()

    def _logprobs(self, tokens: Tensor, recompute: bool, attention: str) -> Tensor:
        decoder, labels = self.model.model, tokens[:, 1:].reshape(-1)
        branch = decoder.embed_tokens(tokens[:, :-1])
        residual = torch.zeros_like(branch, requires_grad=True)  # as in later layers, for one graph
        positions = torch.arange(branch.shape[1], device=branch.device)[None]
        cos, sin = decoder.rotary_emb(branch, positions)
        for layer in decoder.layers:
            branch, residual = self._layer(layer, branch, residual, cos, sin, recompute, attention)
        weight, rows = self.model.lm_head.weight, self._head_rows
        chunks = zip(branch.flatten(0, 1).split(rows), residual.flatten(0, 1).split(rows), labels.split(rows))
        return torch.cat([self._head(decoder.norm, weight, *chunk) for chunk in chunks])

    def gradients(self) -> dict[str, Tensor]:
        return {name: gradient(parameter) for name, parameter in self.model.named_parameters()}

    def release(self) -> None:
        self.model.zero_grad(set_to_none=True)


def _layer(
    layer: Any, branch: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, recompute: bool, attention: str
) -> tuple[Tensor, Tensor]:
    if attention not in ATTENTION:  # that the graph depends on the name, since the kernel is chosen around it
        raise ValueError(attention)

    def body(branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + branch
        x = layer.input_layernorm(residual)
        x, _ = layer.self_attn(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)
        residual = residual + x
        return layer.mlp(layer.post_attention_layernorm(residual)), residual

    if not recompute:
        return body(branch, residual)
    recomputed: tuple[Tensor, Tensor] = checkpoint(body, branch, residual, use_reentrant=False)
    return recomputed


def _head(norm: nn.Module, weight: Tensor, branch: Tensor, residual: Tensor, labels: Tensor) -> Tensor:
    logits = linear(norm(residual + branch), weight).float()
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1)


@contextmanager
def _compiling() -> Iterator[None]:
    """Room for a graph per case, and none from the cache of autograd graphs, whose key lacks the attention kernel."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as autograd

    with dynamo.patch(recompile_limit=64), autograd.patch(enable_autograd_cache=False):
        yield


def attention_run(call: Callable[[], object]) -> list[str]:
    """The operators of fused attention that run in a call, of all backends."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    fused = {event.key for event in profile.key_averages() if "_scaled_dot_product_" in event.key}
    return sorted(name.removeprefix("aten::") for name in fused if not name.endswith("attention_math"))
