"""A model's weights in memory that can be given back for a while. What brings them again writes all of them anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vexact.rollout.execution.lent_memory import WEIGHTS, LentMemory, ends
from vexact.weights import named_checksums

_FACTS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "requires_grad", "nbytes")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "ndim", "itemsize", "grad")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point),
    }
)
"""What may be asked of a weight that is away."""


class AbsentWeight(Tensor):
    """Stands for a weight that is away: it has its shape, type and device, and whatever would read or write it raises
    RuntimeError."""

    @classmethod
    def like(cls, weight: Tensor) -> AbsentWeight:
        one = torch.empty((), dtype=weight.dtype, device=weight.device)
        return Tensor._make_subclass(cls, one.expand(weight.shape))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _FACTS:
            raise RuntimeError(
                "the rollout's weights are given back (enable_sleep_mode): there is nothing to read or to write before "
                "a weight sync brings them again"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"AbsentWeight({tuple(self.shape)}, {self.dtype}, {self.device})"


@dataclass(frozen=True, slots=True)
class GivenBack:
    """What was computed with before the memory went away."""

    version: int
    checksums: Mapping[str, int]  # of every weight, by name


class WeightMemory:
    """The parameters of one model, all in one stretch of memory. What is no parameter, a rotary table, stays."""

    def __init__(self) -> None:
        """Of no model: there is nothing to give back."""
        self._model = nn.Module()
        self._memory: LentMemory | None = None
        self._placed: dict[str, nn.Parameter] = {}
        self._absent: dict[nn.Parameter, Tensor] = {}  # made beforehand: what gives memory back must not fail half way
        self._tables: list[tuple[dict[str, Any], str, nn.Parameter]] = []  # of a module, a name in it, what is there
        self.released = False  # the model does not have its parameters
        self.given_back: GivenBack | None = None  # the last time

    def allocate(self, model: nn.Module, device: torch.device) -> None:
        """Gives the parameters of a model on the meta device memory, zeroed. A parameter that two modules share stays
        one. Raises torch.OutOfMemoryError if there is too little."""
        named = dict(model.named_parameters())
        stops = ends(weight.nbytes for weight in named.values())
        self._model, self._memory = model, LentMemory(stops[-1], device, WEIGHTS)
        placed: dict[Tensor, nn.Parameter] = {}
        for (name, weight), start in zip(named.items(), [0, *stops]):
            values = self._memory.bytes[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            self._placed[name] = placed[weight] = nn.Parameter(values, weight.requires_grad)
        for table in [module._parameters for module in model.modules()]:
            self._tables += [(table, name, placed[weight]) for name, weight in table.items() if weight is not None]
        self._absent = {weight: AbsentWeight.like(weight) for weight in placed.values()}
        self._fill_tables({weight: weight for weight in placed.values()})

    def hide(self) -> None:
        """The model has ``AbsentWeight`` where it had parameters, whose values nobody needs; their memory stays."""
        self._fill_tables(self._absent)
        self.released = True

    def release(self, version: int) -> None:
        """Gives the memory of weights of ``version`` back, once the device is done; nothing if it is away.

        Until ``restore`` the model has ``AbsentWeight`` where it had parameters.

        Raises:
            RuntimeError: the model has its memory from elsewhere, or the device cannot bring memory back to the same
                addresses.
        """
        if self._memory is None:
            raise RuntimeError("these weights cannot be given back: the engine was made without enable_sleep_mode=True")
        given_back = self.given_back if self.released else GivenBack(version, named_checksums(self._model))
        self._memory.release()
        self.given_back = given_back
        self.hide()

    def resume(self) -> Mapping[str, Tensor]:
        """Memory again, at the addresses that graphs hold: the parameters by name, whose values are not there yet.

        Raises torch.OutOfMemoryError if others have taken the memory; it then stays away.
        """
        assert self._memory is not None, "what was released has memory"
        self._memory.resume()
        return self._placed

    def restore(self) -> None:
        """The model has its parameters again, which have got their values."""
        if self.released:
            self._fill_tables({weight: weight for weight in self._placed.values()})
            self.released = False

    def _fill_tables(self, shown: Mapping[nn.Parameter, Tensor]) -> None:
        for table, name, weight in self._tables:
            table[name] = shown[weight]
