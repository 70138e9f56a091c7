"""Records what every operator of a model produced for one request, as one exact fingerprint per token.

Only fingerprints are kept, 8 bytes per operator and token, so a long request costs megabytes. Once the finder knows
where two recordings part, a second pass keeps the values of that one place (:class:`Spot`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vexact.ops as invariant
from vexact.models.opset import OpSet
from vexact.ops import PagedMetadata

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements widened to 64 bits at a time
_HEADS = dict.fromkeys(("rope", "qk_norm_rope", "latent_rope"), ("query", "key"))
_OUTPUTS = {"add_rms_norm": ("residual", "output"), **_HEADS}
KV = ("key", "value")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator, shared by the tokens it computed."""

    path: str  # prefill, chunk, decode or packed
    shape: tuple[int, ...]  # of the whole output
    dtype: str
    arguments: tuple[tuple[str, Any], ...] = ()  # scalar arguments that decide bits


@dataclass(frozen=True, slots=True)
class Site:
    """One output of one operator of the model, e.g. the query that rope returns in layer 3."""

    module: str  # layers.3.attention.qkv_proj
    op: str  # linear
    output: str = "output"
    repeat: int = 0  # how many calls of the same place came before in this forward

    @property
    def layer(self) -> int | None:
        parts = self.module.split(".")
        return int(parts[1]) if parts[0] == "layers" else None

    def __str__(self) -> str:
        suffix = "" if self.output == "output" else f" ({self.output})"
        return f"{self.op} of {self.module}{suffix}" + (f", call {self.repeat + 1}" if self.repeat else "")


@dataclass(frozen=True, slots=True)
class Spot:
    """The row to keep in the second pass."""

    site: Site
    position: int


@dataclass(slots=True, eq=False)
class Kept:
    """What the second pass keeps of a spot, on the CPU."""

    row: Tensor  # the operator's output of the token
    expected: Tensor | None = None  # what the operator of vexact.ops gives for the same arguments


@dataclass(slots=True, eq=False)
class Rows:
    """Per absolute position of the request: the fingerprint of a row, and the call that computed it."""

    prints: dict[int, int] = field(default_factory=dict)
    calls: dict[int, Call] = field(default_factory=dict)


class Recorder:
    """Collects the rows of one request; ``begin`` says which tokens the next forward computes."""

    def __init__(self, keep: Spot | None = None, hold: Site | None = None) -> None:
        self.keep, self.hold = keep, hold
        self.kept: Kept | None = None
        self.held: Tensor | None = None  # whole output of ``hold`` in the last forward
        self.rows: dict[Site, Rows] = {}  # in the order of the forward
        self.stale: dict[Site, int] = {}  # attention outputs at the kept spot whose pages differ: first position
        self._positions = np.empty(0, np.int64)
        self._path = ""
        self._seen: Counter[tuple[str, str, str]] = Counter()

    def begin(self, positions: np.ndarray, path: str) -> None:
        """The next forward computes the tokens at these absolute positions on this code path."""
        self._positions, self._path = positions, path
        self._seen.clear()

    def wrap(self, ops: OpSet, name: str, module: nn.Module) -> OpSet:
        """The same operators, recorded as those of ``module``."""
        return OpSet(**{f.name: self._wrapped(getattr(ops, f.name), f.name, name, module) for f in fields(OpSet)})

    def add(self, site: Site, positions: np.ndarray, rows: Tensor, call: Call) -> None:
        """Fingerprints of rows (N, ...) at N positions."""
        entry = self.rows.setdefault(site, Rows())
        for position, print_ in zip(positions.tolist(), fingerprints(rows), strict=True):
            entry.prints[position] = print_
            entry.calls[position] = call

    def _wrapped(self, function: Callable[..., Any], op: str, name: str, module: nn.Module) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._record(op, _owner(name, module, op, args), args, kwargs, result)
            return result

        return recorded

    def _record(self, op: str, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if op == "attention":
            for label, rows in zip(KV, args[1:3]):
                self._store(Site(owner, op, label), rows, ())
        arguments = _scalars(op, args, kwargs)
        for index, (label, rows) in enumerate(_outputs(op, result)):
            site = self._store(Site(owner, op, label), rows, arguments)
            row = self._row_of_spot(site, rows)
            if row is not None:
                if op == "attention":
                    self._check_pages(site, args)  # before the reference writes the new keys again
                expected = getattr(invariant, op)(*args, **kwargs)
                self.kept = Kept(_host(rows[row]), _host(_outputs(op, expected)[index][1][row]))

    def _store(self, site: Site, rows: Tensor, arguments: tuple[tuple[str, Any], ...]) -> Site:
        key = site.module, site.op, site.output
        site = Site(*key, repeat=self._seen[key])
        self._seen[key] += 1
        # the head sees the last tokens of a step only
        positions = self._positions[len(self._positions) - rows.shape[0] :]
        call = Call(self._path, tuple(rows.shape), _dtype(rows), arguments)
        self.add(site, positions, rows, call)
        if site == self.hold:
            self.held = rows.detach()
        row = self._row_of_spot(site, rows)
        if row is not None:
            self.kept = Kept(_host(rows[row]))
        return site

    def _row_of_spot(self, site: Site, rows: Tensor) -> int | None:
        if self.keep is None or site != self.keep.site:
            return None
        first = len(self._positions) - rows.shape[0]
        found = np.flatnonzero(self._positions[first:] == self.keep.position)
        return int(found[0]) if len(found) else None

    def _check_pages(self, site: Site, args: tuple[Any, ...]) -> None:
        metadata, cache = args[3], args[5] if len(args) > 5 else None
        if isinstance(metadata, PagedMetadata) and cache is not None:
            position = self.first_stale(site.module, metadata, cache)
            if position is not None:
                self.stale[site] = position

    def first_stale(self, module: str, metadata: PagedMetadata, cache: tuple[Tensor, Tensor]) -> int | None:
        """The first position whose keys or values in the pages are not those that were recorded for it."""
        num_keys, page_size = int(metadata.seqused_k[0]), cache[0].shape[1]
        pages = metadata.block_table[0, : -(-num_keys // page_size)].long()
        wrong = []
        for label, pool in zip(KV, cache):
            written = self.rows[Site(module, "attention", label)].prints
            read = fingerprints(pool[pages].flatten(0, 1)[:num_keys])
            wrong += [p for p, print_ in enumerate(read) if written.get(p, print_) != print_]
        return min(wrong, default=None)


@contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """While open, every operator call of ``model`` is recorded."""
    before = [(name, m, m.ops) for name, m in model.named_modules() if isinstance(getattr(m, "ops", None), OpSet)]
    try:
        for name, module, ops in before:
            module.__dict__["ops"] = recorder.wrap(ops, name, module)
        yield
    finally:
        for _, module, ops in before:
            module.__dict__["ops"] = ops


def fingerprints(rows: Tensor) -> list[int]:
    """Per row of (N, ...): sum_i bits_i * (2 i + 1) modulo 2^64. A change of any single element always shows."""
    flat = rows.detach().reshape(rows.shape[0], -1).contiguous()
    bits = flat.view(BITS[flat.element_size()])
    weights = torch.arange(bits.shape[1], device=bits.device).mul_(2).add_(1)
    step = max(1, _CHUNK // max(1, bits.shape[1]))
    return [value for chunk in bits.split(step) for value in (chunk.long() * weights).sum(1).tolist()]


def _outputs(op: str, result: Any) -> list[tuple[str, Tensor]]:
    if op == "add_rms_norm":  # the residual is an input of the norm, hence the earlier of the two
        return [("residual", result[1]), ("output", result[0])]
    return list(zip(_OUTPUTS.get(op, ("output",)), result if isinstance(result, tuple) else (result,)))


def _owner(name: str, module: nn.Module, op: str, args: tuple[Any, ...]) -> str:
    """The parameter's module for a call with a weight (fused projections, embedding, head), else the caller."""
    if op == "embedding":
        return "embed_tokens"
    if op == "linear":
        for child_name, child in module.named_children():
            if getattr(child, "weight", None) is args[1] and child_name != "embed_tokens":
                return f"{name}.{child_name}".lstrip(".")
        return name or "lm_head"  # a tied head multiplies by the embedding
    return name


def _scalars(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    if op == "attention":
        causal = args[6] if len(args) > 6 else kwargs.get("causal", True)
        return (("softmax_scale", args[4] if len(args) > 4 else kwargs["softmax_scale"]), ("causal", causal))
    if op in ("rms_norm", "add_rms_norm"):
        return (("eps", args[-1] if "eps" not in kwargs else kwargs["eps"]),)
    return ()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
