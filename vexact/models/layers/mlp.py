"""The dense feed-forward; also the experts that every token goes through."""

from __future__ import annotations

from torch import Tensor, nn

from vexact.models.opset import OpSet
from vexact.ops import linear_swiglu


class MLP(nn.Module):
    """SwiGLU feed-forward with fused gate and up projections."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, ops: OpSet) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        ops, gate_up_proj, down_proj = self.ops, self.gate_up_proj, self.down_proj
        if gate_up_proj.bias is None and ops.fuses_swiglu:
            hidden = linear_swiglu(x, gate_up_proj.weight)
        else:
            hidden = ops.swiglu(ops.linear(x, gate_up_proj.weight, gate_up_proj.bias))
        out: Tensor = ops.linear(hidden, down_proj.weight, down_proj.bias)
        return out
