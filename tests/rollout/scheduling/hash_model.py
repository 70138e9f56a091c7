"""In place of a model: a token is a hash of all keys that its row finds in the pages, its draw and the weights.

One wrong page, position or input id changes every later token, as with a model, and a step costs next to nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from rollout_models import VOCAB

_MIX = np.uint64(0x9E3779B97F4A7C15)


class HashModel:
    """Computes the steps of ``engine``; its page cache holds the hash of token and position."""

    def __init__(self, engine):
        self._runner, self._page_size = engine._runner, engine.config.page_size
        self._weight = engine.model.embed_tokens.weight
        self._cache = np.zeros((engine.num_pages, self._page_size), np.uint64)
        self._runner._forward, self._runner._sampled = self._forward, self._sampled

    def _forward(self, inputs):
        ids = self._runner._feed.fill(inputs.input_ids, inputs.token_sources).numpy().astype(np.uint64)
        positions, meta = inputs.positions.numpy(), inputs.attention
        where = meta.slot_mapping.numpy()
        written = where >= 0
        self._cache.reshape(-1)[where[written]] = _mixed(ids * np.uint64(4096) + positions.astype(np.uint64))[written]
        starts, lengths, table = meta.cu_seqlens_q.numpy(), meta.seqused_k.numpy(), meta.block_table.numpy()
        hidden = np.zeros(len(ids), np.uint64)
        for sequence, length in enumerate(lengths.tolist()):
            pages = table[sequence, : -(-length // self._page_size)]
            keys = np.cumsum(self._cache[pages].reshape(-1)[:length] * _odd(length))
            rows = slice(starts[sequence], starts[sequence + 1])
            hidden[rows] = keys[positions[rows]] if length else 0
        return hidden, None

    def _sampled(self, inputs, hidden, _):
        rows = slice(None) if inputs.sample_rows is None else inputs.sample_rows.numpy()
        salt = self._weight.detach()[0, :1].view(torch.int32).numpy().astype(np.uint64)
        draw = inputs.sampling.seed.numpy().view(np.uint64) * _MIX + inputs.sampling.position.numpy().astype(np.uint64)
        bits = _mixed(hidden[rows] + salt + draw * (inputs.sampling.temperature.numpy() > 0))
        logprobs = -((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23))
        columns = [(bits % np.uint64(VOCAB)).astype(np.int32), logprobs.view(np.int32), (-logprobs).view(np.int32)]
        return torch.from_numpy(np.stack(columns))


def _odd(count):
    return np.arange(1, 2 * count, 2, dtype=np.uint64)


def _mixed(values):
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _MIX
        return values ^ (values >> np.uint64(31))
