"""New weights for an engine, tensor by tensor, by Hugging Face's names; done when the engine holds what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from vexact.models.hf_names import to_hf
from vexact.rollout import Engine
from vexact.weights.fingerprint import checksum
from vexact_verl.parcels import Parcel

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Arrival:
    """One update. Until ``finish`` the engine refuses to generate, and for good if anything here raises."""

    def __init__(self, engine: Engine, version: int) -> None:
        """Raises RuntimeError while requests are unfinished."""
        self._stack, self._version = ExitStack(), version
        parameters = self._stack.enter_context(engine.replacing_weights(version))
        config = engine.model.config
        self._rows: dict[str, Tensor] = dict(to_hf(config, parameters.items()))
        self._sums: dict[str, int] = {}
        self._has_no_head = config.tie_word_embeddings

    @torch.no_grad()
    def put(self, parcels: Sequence[Parcel]) -> None:
        """Raises ValueError for a tensor that does not belong here, or did not arrive as it was sent."""
        for parcel in parcels:
            if parcel.name in self._sums:
                raise ValueError(f"{parcel.name} was sent twice for version {self._version}")
            self._sums[parcel.name] = parcel.checksum
            if parcel.name == HEAD and self._has_no_head:
                continue
            rows = self._rows.get(parcel.name)
            if rows is None:
                raise ValueError(f"the rollout's model has no {parcel.name}; trainer and rollout have different models")
            if (tuple(rows.shape), rows.dtype) != (parcel.shape, parcel.dtype):
                raise ValueError(
                    f"{parcel.name} was sent as {parcel.dtype} {parcel.shape}, the rollout has {rows.dtype} "
                    f"{tuple(rows.shape)}"
                )
            rows.copy_(parcel.open())
            if (held := checksum(rows)) != parcel.checksum:
                raise ValueError(
                    f"{parcel.name} of version {self._version} arrived with other bits: checksum {held:#x}, "
                    f"{parcel.checksum:#x} was sent"
                )

    def finish(self) -> None:
        """Raises ValueError when tensors are missing, or a tied head is not the embedding."""
        missing = sorted(self._rows.keys() - self._sums.keys())
        if missing:
            raise ValueError(f"version {self._version} lacks {len(missing)} tensors, the first {missing[0]}")
        if self._sums.get(HEAD, self._sums[EMBEDDING]) != self._sums[EMBEDDING] and self._has_no_head:
            raise ValueError(f"{HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings=true")
        self._stack.close()

    def abandon(self, error: BaseException) -> None:
        """The engine stays without a version."""
        self._stack.__exit__(type(error), error, error.__traceback__)
