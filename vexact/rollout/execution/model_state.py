"""What a captured graph holds of a model besides the values of its weights, read cheaply enough for every step."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vexact.models.opset import OpSet, replayable


class ModelState:
    """Watches the operators and the storage of a model whose submodules stay the same ones.

    Operators may be replaced at any time: a controlled mismatch, a diagnosis that records every call. Tensors may move
    while no request is running; values written in place are no change.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._with_ops = [module.__dict__ for module in modules if isinstance(getattr(module, "ops", None), OpSet)]
        tables: list[dict[str, Any]] = [
            *(module._parameters for module in modules),
            *(module._buffers for module in modules),
        ]
        self._tensors = [(table, name) for table in tables for name, tensor in table.items() if tensor is not None]
        self._hooks = list(chain.from_iterable((m._forward_hooks, m._forward_pre_hooks) for m in modules))
        self._ops: list[OpSet] = []
        self._addresses: list[int] = []
        self._replayable = False

    def moved(self) -> bool:
        """Whether a tensor lies elsewhere than at the last call."""
        before = self._addresses
        self._addresses = [table[name].data_ptr() for table, name in self._tensors]
        return self._addresses != before

    def changed(self) -> bool:
        """Whether an operator is another than at the last call. The first call says yes."""
        ops = [attributes["ops"] for attributes in self._with_ops]
        if ops == self._ops:
            return False
        self._ops = ops
        self._replayable = all(map(replayable, ops))
        return True

    def replayable(self) -> bool:
        """Whether replaying a graph would leave nothing out that a forward does: hooks, dispatch modes, operators that
        work on the host. Answers for the operators seen by the last ``changed()``."""
        return self._replayable and not any(self._hooks) and not is_in_torch_dispatch_mode()
