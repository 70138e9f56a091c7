"""One mixture-of-experts layer for the benchmarks: ours and transformers', whole and in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe.cases import DEVICE, MoeShape, Weights, draw_groups
from vexact import ops
from vexact.ops.kernels.moe import combine, few, grouped_linear

Call = Callable[[], object]
BF16 = torch.bfloat16


def floor_us(layer: Layer, tokens: int, bandwidth: float) -> float:
    """Microseconds to read the matrices of the experts that this many tokens hit, on average over routings."""
    shape = layer.shape
    seeds = range(max(1, min(16, 256 // tokens)))
    hit = [float((draw_groups(shape, tokens, seed=seed)[2].diff() > 0).sum()) for seed in seeds]
    widths = sum(hit) / len(hit) * shape.width + shape.shared
    return 3 * shape.hidden * widths * 2 / bandwidth * 1e6


def draw(*size: int) -> Tensor:
    return torch.randn(size, device=DEVICE, dtype=BF16)


class Layer:
    """Its methods return one call for a number of tokens and a seed of the routing."""

    BACKWARD = ("grad_down_input", "grad_down_weight", "grad_gate_up_input", "grad_gate_up_weight")

    def __init__(self, shape: MoeShape, weights: Weights) -> None:
        self.shape, self.weights = shape, weights
        self.settings = {"top_k": shape.top_k, "scoring": shape.scoring, "round_to": BF16}
        self.shared = []
        if shape.shared:
            self.shared = [draw(2 * shape.shared, shape.hidden) * 0.02, draw(shape.hidden, shape.shared) * 0.02]
        self.stock_experts = self._transformers_experts()

    def _transformers_experts(self) -> torch.nn.Module:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        shape = self.shape
        sizes = {"hidden_size": shape.hidden, "moe_intermediate_size": shape.width}
        config = Qwen3MoeConfig(num_experts=shape.experts, num_experts_per_tok=shape.top_k, **sizes)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(self.weights.gate_up)
        experts.down_proj = torch.nn.Parameter(self.weights.down)
        return experts

    def _logits(self, tokens: int, seed: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return torch.randn(tokens, self.shape.experts, device=DEVICE, generator=generator)

    def _groups(self, tokens: int, seed: int) -> ops.ExpertGroups:
        return ops.ExpertGroups(*draw_groups(self.shape, tokens, seed=seed))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        routes, groups = ops.route_and_group(logits, **self.settings)
        shared = self._shared(x)
        act = ops.grouped_swiglu(x, self.weights.gate_up, groups, gather=True)
        return ops.combine(
            ops.grouped_linear(act, self.weights.down, groups, gather=False), routes.weights, groups, shared
        )

    def few_forward(self, x: Tensor, logits: Tensor, **tuning: Any) -> Tensor:
        """:meth:`forward` in two launches, for a few tokens."""
        settings = self.shape.top_k, self.shape.scoring, 1, 1, True, 1.0, BF16, 0
        given = x, logits, None, None, None, self.weights.gate_up, self.weights.down, self._shared(x)
        return few.forward(*given, *settings, **tuning)

    def _shared(self, x: Tensor) -> Tensor | None:
        return ops.linear(ops.swiglu(ops.linear(x, self.shared[0])), self.shared[1]) if self.shared else None

    def stock_routes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in bf16 and experts, by torch."""
        scores = logits.softmax(1) if self.shape.scoring == "softmax" else logits.sigmoid()
        weights, experts = scores.topk(self.shape.top_k, dim=1)
        return (weights / weights.sum(1, keepdim=True)).to(BF16), experts

    def add_shared(self, out: Tensor, x: Tensor) -> Tensor:
        """``out`` plus the shared experts, by torch."""
        if not self.shared:
            return out
        gate, up = F.linear(x, self.shared[0]).chunk(2, dim=1)
        return out + F.linear(F.silu(gate) * up, self.shared[1])

    def stock_forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = self.stock_routes(logits)
        return self.add_shared(self.stock_experts(x, experts, weights), x)

    def inputs(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """x (T, H), and the logits of one routing."""
        return draw(tokens, self.shape.hidden), self._logits(tokens, seed)

    def layer(self, tokens: int, seed: int) -> Call:
        x, logits = self.inputs(tokens, seed)
        return torch.no_grad()(lambda: self.forward(x, logits))

    def few(self, tokens: int, seed: int, **tuning: Any) -> Call:
        x, logits = self.inputs(tokens, seed)
        return torch.no_grad()(lambda: self.few_forward(x, logits, **tuning))

    def stock_layer(self, tokens: int, seed: int) -> Call:
        x, logits = self.inputs(tokens, seed)
        return torch.no_grad()(lambda: self.stock_forward(x, logits))

    def route_and_group(self, tokens: int, seed: int) -> Call:
        logits = self._logits(tokens, seed)
        return lambda: ops.route_and_group(logits, **self.settings)

    def gate_up(self, tokens: int, seed: int) -> Call:
        """With SwiGLU."""
        x, (rows, _, offsets) = draw(tokens, self.shape.hidden), self._groups(tokens, seed)
        return lambda: grouped_linear.swiglu_forward(x, self.weights.gate_up, rows, offsets, self.shape.top_k)

    def gate_up_alone(self, tokens: int, seed: int) -> Call:
        x, (rows, _, offsets) = draw(tokens, self.shape.hidden), self._groups(tokens, seed)
        return lambda: grouped_linear.forward(x, self.weights.gate_up, rows, offsets, self.shape.top_k)

    def gate_up_in_place(self, tokens: int, seed: int) -> Call:
        """Of rows that are gathered already, as torch's product takes them."""
        groups = self._groups(tokens, seed)
        x = draw(groups.rows.numel(), self.shape.hidden)
        return lambda: grouped_linear.forward(x, self.weights.gate_up, None, groups.offsets, self.shape.top_k)

    def down(self, tokens: int, seed: int) -> Call:
        groups = self._groups(tokens, seed)
        act = draw(groups.rows.numel(), self.shape.width)
        return lambda: grouped_linear.forward(act, self.weights.down, None, groups.offsets, self.shape.top_k)

    def combine(self, tokens: int, seed: int) -> Call:
        groups = self._groups(tokens, seed)
        y, weights = draw(groups.rows.numel(), self.shape.hidden), torch.rand(groups.slots.shape, device=DEVICE)
        return lambda: combine.forward(y, weights, groups.slots, None)

    def stock_gate_up(self, tokens: int, seed: int) -> Call:
        """Rows that are gathered already, without SwiGLU."""
        groups = self._groups(tokens, seed)
        x, matrix = draw(groups.rows.numel(), self.shape.hidden), self.weights.gate_up.transpose(1, 2)
        return lambda: F.grouped_mm(x, matrix, offs=groups.offsets[1:])

    def stock_gather_gate_up(self, tokens: int, seed: int) -> Call:
        """The same with the gather."""
        groups = self._groups(tokens, seed)
        x, matrix = draw(tokens, self.shape.hidden), self.weights.gate_up.transpose(1, 2)
        token = groups.rows.long() // self.shape.top_k
        return lambda: F.grouped_mm(x[token], matrix, offs=groups.offsets[1:])

    def stock_down(self, tokens: int, seed: int) -> Call:
        groups = self._groups(tokens, seed)
        x, matrix = draw(groups.rows.numel(), self.shape.width), self.weights.down.transpose(1, 2)
        return lambda: F.grouped_mm(x, matrix, offs=groups.offsets[1:])

    def grad_down_input(self, tokens: int, seed: int) -> Call:
        groups = self._groups(tokens, seed)
        dy = draw(groups.rows.numel(), self.shape.hidden)
        return lambda: grouped_linear.grad_input(dy, self.weights.down, groups.offsets)

    def grad_down_weight(self, tokens: int, seed: int) -> Call:
        groups = self._groups(tokens, seed)
        dy, act = draw(groups.rows.numel(), self.shape.hidden), draw(groups.rows.numel(), self.shape.width)
        return lambda: grouped_linear.grad_weight(dy, act, None, groups.offsets, self.shape.top_k)

    def grad_gate_up_input(self, tokens: int, seed: int) -> Call:
        """With the sum over the places of a token."""
        groups = self._groups(tokens, seed)
        dy = draw(groups.rows.numel(), 2 * self.shape.width)
        return lambda: combine.total(grouped_linear.grad_input(dy, self.weights.gate_up, groups.offsets), groups.slots)

    def grad_gate_up_weight(self, tokens: int, seed: int) -> Call:
        groups = self._groups(tokens, seed)
        dy, x = draw(groups.rows.numel(), 2 * self.shape.width), draw(tokens, self.shape.hidden)
        return lambda: grouped_linear.grad_weight(dy, x, groups.rows, groups.offsets, self.shape.top_k)

    def train(self, tokens: int, seed: int) -> Call:
        return self.step(self.forward, tokens, seed)

    def stock_train(self, tokens: int, seed: int) -> Call:
        return self.step(self.stock_forward, tokens, seed)

    def step(
        self, forward: Callable[[Tensor, Tensor], Tensor], tokens: int, seed: int
    ) -> Callable[[], tuple[Tensor, ...]]:
        """One call is a forward and the gradients of tokens, logits, gate_up and down."""
        x, logits = (tensor.requires_grad_() for tensor in self.inputs(tokens, seed))
        dout, learned = draw(tokens, self.shape.hidden), (self.weights.gate_up, self.weights.down)

        def step() -> tuple[Tensor, ...]:
            for weight in learned:
                weight.requires_grad_()
            inputs = (x, logits, *(self.stock_experts.parameters() if forward == self.stock_forward else learned))
            try:
                out = forward(x, logits)
                self.after_forward = torch.cuda.memory_allocated()
                return torch.autograd.grad(out, inputs, dout)
            finally:
                for weight in learned:
                    weight.requires_grad_(False)

        return step

    def memory(self, step: Call) -> tuple[float, float]:
        """GiB that are allocated after the forward, and at the peak, beyond those before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (self.after_forward - before) / 2**30, (torch.cuda.max_memory_allocated() - before) / 2**30
