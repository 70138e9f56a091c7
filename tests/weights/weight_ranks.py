"""Processes that move weights to each other over Gloo, and faults planted on their way."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from moe_configs import MOONLIGHT, with_router_biases

from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.training import Actor, ActorConfig
from vexact.weights import transfer

RAW = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 31,  # rows that three ranks and two do not divide evenly
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}
# of three ranks one has no expert
EXPERTS = {key: value for key, value in MOONLIGHT.items() if key != "tie_word_embeddings"} | {
    "vocab_size": 31,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
}
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def model(seed, dtype=torch.float32, tied=True, **changes):
    """``changes`` may be all of ``EXPERTS``."""
    config = ModelConfig.from_hf_dict(RAW | {"tie_word_embeddings": tied} | changes)
    return with_router_biases(random_model(config, seed, dtype))


def engine(seed, dtype=torch.float32, **changes):
    return Engine(model=model(seed, dtype, **changes), max_model_len=64, num_pages=8, page_size=16)


def trainer(seed, group, dtype=torch.float32, tied=True, changes=None, **config):
    config = ActorConfig(dtype=str(dtype).removeprefix("torch."), **config)
    return Actor(model(seed, tied=tied, **(changes or {})), config, "cpu", group)


def holds(held, seed, dtype, tied=True, **changes):
    expected = dict(model(seed, tied=tied, **changes).named_parameters())
    named = dict(held.model.named_parameters())
    dtypes = {name: torch.float32 if name.endswith("router.bias") else dtype for name in named}
    return named.keys() == expected.keys() and all(
        p.dtype == dtypes[n] and torch.equal(p, expected[n].to(dtypes[n])) for n, p in named.items()
    )


@contextlib.contextmanager
def on_arrival(change):
    """``change(plan, bucket, slots)`` sees every bucket before it is copied; returning True keeps it from being."""
    put_slots = transfer.Incoming.put_slots

    def changed(self, bucket, slots):
        if not change(self._plan, bucket, slots):
            put_slots(self, bucket, slots)

    with mock.patch.object(transfer.Incoming, "put_slots", changed):
        yield


@contextlib.contextmanager
def after_arrival(change):
    """``change(parameters)`` sees what the engine holds, flat by name, right before it is fingerprinted."""
    checksums = transfer.Incoming.checksums

    def changed(self):
        change(dict(zip([spec.name for spec in self._plan.manifest], self._flat, strict=True)))
        return checksums(self)

    with mock.patch.object(transfer.Incoming, "checksums", changed):
        yield


def flip_first_bit_of(name, source):
    """In flight: one bit of the rows that rank ``source`` sent of a tensor."""

    def change(plan, bucket, slots):
        for piece in bucket.pieces:
            if plan.manifest[piece.tensor].name == name and piece.start == 0:
                slots[source, piece.slot_offset] ^= 1

    return change
