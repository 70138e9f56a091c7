"""Rotary embedding: positions and one fp32 table reach our operator in the place of cosines and sines.

Models hand ``(cos, sin)``, or both as one complex tensor, from their rotary module to every layer, whose ``forward``
gives them to a function of its own file. On a converted instance the module returns :class:`Angles`, and the layer runs
the same code with :func:`rotate` or :func:`rotate_pairs` under that function's name.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vexact.ops import rope
from vexact.swaps.classes import before

_BATCH_DEPENDENT = ("dynamic", "longrope")  # their angles follow the longest sequence of the batch


class Angles(NamedTuple):
    """Positions (B * T,) int64 and the table's bits (P, D) int32, which travel like ``(cos, sin)``."""

    positions: Tensor
    bits: Tensor

    def to(self, *_: Any) -> Self:
        """Itself: a layer of DeepSeek-V2 sends its angles to the device on which they are."""
        return self


class RotaryTable(nn.Module):
    """Stands for a model's rotary module, with a table (P, D) for each type of layer that the module tells apart.

    A table travels as int32 bits: FSDP2's mixed precision casts every floating input of a layer, and these numbers have
    to stay fp32. It is no buffer either, so that neither ``model.to(dtype)`` nor ``to_empty`` reaches it.
    """

    def __init__(self, tables: Mapping[str | None, Tensor]) -> None:
        super().__init__()
        self._bits = {(one, torch.device("cpu")): table.contiguous().view(torch.int32) for one, table in tables.items()}

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Angles:
        key = layer_type, x.device
        if key not in self._bits:
            self._bits[key] = self._bits[layer_type, torch.device("cpu")].to(x.device)
        return Angles(position_ids.expand(x.shape[0], -1).reshape(-1), self._bits[key])


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` for what :class:`RotaryTable` returns as ``cos`` and ``sin``.

    Args:
        q, k: (B, heads, T, D), or (B, T, heads, D) with ``unsqueeze_dim=2``. A table of fewer than D columns rotates
            the first ones.

    Raises:
        ValueError: cosines and sines, because the model's rotary module was not exchanged.
    """
    positions, bits = cos, sin
    if bits.dtype != torch.int32 or positions.dtype != torch.int64:
        raise ValueError(
            f"rotary embedding: got cosines and sines in {cos.dtype}, expected the table of a converted model; "
            "exchange the model's rotary module too"
        )
    table = bits.view(torch.float32)
    width = table.shape[1]
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q_turned, k_turned = rope(q[..., :width].flatten(0, 1), k[..., :width].flatten(0, 1), positions, table)
    q, k = _with_rest(q_turned, q), _with_rest(k_turned, k)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


def rotate_pairs(q: Tensor, k: Tensor, cos: Any, sin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same for heads whose neighbouring columns turn together: the even columns come out before the odd ones.

    Attention does not see the order, which is the same in queries and keys, and vexact's own decoder has this one.

    Args:
        cos: both parts of :class:`Angles`, where ``sin`` is not given.
    """
    return rotate(_halves(q), _halves(k), *(cos if sin is None else (cos, sin)))


def _halves(x: Tensor) -> Tensor:
    """(a0, b0, a1, b1, …) -> (a0, a1, …, b0, b1, …)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _with_rest(turned: Tensor, x: Tensor) -> Tensor:
    """The rotated columns (B * T, heads, width) and the columns of ``x`` (B, T, heads, D) that are not."""
    width = turned.shape[-1]
    turned = turned.view(*x.shape[:3], width)
    return turned if x.shape[-1] == width else torch.cat((turned, x[..., width:]), dim=-1)


def is_rotary(module: nn.Module) -> bool:
    """Whether the module makes cosines and sines from positions."""
    return bool(_frequencies(module)) and not module._modules and not module._parameters


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in module.named_buffers(recurse=False) if name.endswith("inv_freq")}


def tables_of(rotary: Any, num_positions: int) -> dict[str | None, Tensor]:
    """For each type of layer (None: all alike) a table (num_positions, D), fp32 on the CPU.

    It is computed anew there, since devices differ in the last bits of a power.

    Raises:
        ValueError: the angles depend on the batch, or on more than position and layer, or pairs are not D/2 apart.
    """
    kinds = rotary.rope_type.values() if isinstance(rotary.rope_type, dict) else [rotary.rope_type]
    for kind in set(kinds) & set(_BATCH_DEPENDENT):
        raise ValueError(f"rope_type {kind} makes the angles of a token depend on the longest sequence of its batch")
    arguments = list(inspect.signature(rotary.forward).parameters)
    if len(arguments) != 2 and arguments[2:] != ["layer_type"]:
        raise ValueError(
            f"its forward takes {', '.join(arguments)}; expected hidden states, positions and a layer type"
        )
    layer_types: list[str | None] = [None] if len(arguments) == 2 else sorted(set(rotary.config.layer_types))
    with torch.device("cpu"), torch.no_grad():
        fresh: Any = type(rotary)(copy.deepcopy(rotary.config))
        angles = {one: _angles(fresh, one, num_positions) for one in layer_types}
    own = _frequencies(rotary)
    for name, expected in _frequencies(fresh).items():
        if not own[name].is_meta and not torch.allclose(expected.float(), own[name].detach().cpu().float(), rtol=1e-2):
            raise ValueError(f"its {name} is not that of the model's configuration")
    return angles


def _angles(rotary: Any, layer_type: str | None, num_positions: int) -> Tensor:
    """Cosines in the first half of the columns, sines in the last."""
    more = () if layer_type is None else (layer_type,)
    positions = torch.arange(num_positions)
    angles = rotary(torch.zeros(1), positions[None], *more)
    if isinstance(angles, Tensor) and angles.is_complex():
        return _from_complex(rotary, angles[0], positions)
    cos, sin = angles
    half = cos.shape[-1] // 2
    if not (torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], sin[..., half:])):
        raise ValueError("it pairs neighbouring columns; only pairs that are half a head apart are supported")
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).float()


def _from_complex(rotary: Any, angles: Tensor, positions: Tensor) -> Tensor:
    """The table of a module that returns cosines and sines as one complex tensor (P, D/2), whose polar form has a last
    bit of its own."""
    turned = positions[:, None].float() * rotary.inv_freq.float()
    table = torch.cat((turned.cos(), turned.sin()), dim=-1) * rotary.attention_scaling
    if not torch.allclose(table, torch.cat((angles.real, angles.imag), dim=-1).float(), atol=1e-5):
        raise ValueError("its angles are not position times inv_freq")
    return table


def rotating_class(module: nn.Module) -> type | None:
    """What to make of a layer whose ``forward`` calls a rotary function; None for one that does not.

    Raises:
        ValueError: the function computes neither what :func:`rotate` nor what :func:`rotate_pairs` does.
    """
    original = type(module)
    if original not in _found:
        _found[original] = _find(original)
    return _found[original]


_found: dict[type, type | None] = {}


def _find(original: Any) -> type | None:
    forward: Any = inspect.unwrap(original.forward)
    code = getattr(forward, "__code__", None)
    names = [name for name in code.co_names if name.startswith("apply_") and "rotary" in name] if code else []
    if not names:
        return None
    ours = {name: _same_rotation(name, forward.__globals__[name]) for name in names}
    changed = types.FunctionType(
        forward.__code__,
        forward.__globals__ | ours,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return before(type("Rotating", (), {"forward": changed}), original)


@torch.no_grad()
def _same_rotation(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Which of ours computes what ``function`` does with ordinary angles. Raises ValueError for none."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    positions = torch.tensor([[0, 1, 2, 3, 9], [7, 0, 1, 2, 3]])
    angles = torch.rand(10, 4, generator=generator) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    cos, sin = (torch.cat((half, half), dim=-1)[positions] for half in table.chunk(2, dim=-1))
    known = RotaryTable({None: table})(q, positions)
    theirs = _tried(lambda: function(q, k, cos, sin))
    for ours in (rotate, rotate_pairs):
        if theirs is not None and _close(ours(q, k, *known), theirs):
            return ours
    theirs = _tried(lambda: function(q, k, torch.polar(torch.ones_like(angles), angles)[positions]))
    if theirs is not None and _close(rotate_pairs(q, k, known), [_halves(x) for x in theirs]):
        return rotate_pairs
    raise ValueError(f"its {name} is not the rotation of pairs half a head apart that our operator computes")


def _tried(call: Callable[[], Any]) -> list[Tensor] | None:
    """Queries and keys; None for a function that takes or returns something else."""
    try:
        q, k = call()
        return [q, k]
    except Exception:  # of any class
        return None


def _close(ours: Sequence[Tensor], theirs: Sequence[Any]) -> bool:
    return all(
        isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
        for a, b in zip(ours, theirs, strict=True)
    )
