"""A tiny model with a byte tokenizer, served in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout.soak import TINY
from vexact.models import ModelConfig, random_model, save_hf
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout import Engine
from vexact.serve.server import Server
from vexact.serve.service import Service
from vexact.serve.settings import ServeSettings

MAX_LEN = int(TINY["max_position_embeddings"])


def tiny_config(vocab_size: int) -> ModelConfig:
    """Qwen3 with one layer; wide initial weights, so that samples differ."""
    return ModelConfig.from_hf_dict(TINY | {"vocab_size": vocab_size})


def tiny_engine(*, with_tokenizer: bool = True, **config: Any) -> Engine:
    tokenizer = byte_tokenizer()
    model = random_model(tiny_config(len(tokenizer)), seed=0, dtype=torch.float32)
    if not with_tokenizer:
        return Engine(model=model, eos_token_ids=(), **config)
    return Engine(model=model, tokenizer=tokenizer, eos_token_ids=(tokenizer.eos_token_id,), **config)


def write_checkpoint(path: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = tiny_config(len(tokenizer))
    save_hf(random_model(config, seed=0).named_parameters(), config, path)
    tokenizer.save_pretrained(path)
    return path


@contextmanager
def holding(server: Server) -> Iterator[None]:
    """Inside, the engine takes no step: nothing that was asked for ends before the test has seen it run."""
    go_on = threading.Event()
    held = server._service.engine.submit(lambda engine: go_on.wait())
    try:
        yield
    finally:
        go_on.set()
        held.result()


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Server]:
    """A server in this process; at the end nothing of any request may be left."""
    service = Service(engine, ServeSettings(model_names=("tiny", "alias"), port=0, **settings))
    server = Server(service)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        service.close()
    driven = service.engine
    assert driven.num_unfinished == 0
    assert not any((driven._parts, driven._held, driven._live, driven._unstarted, driven._outbox))
    engine.check_idle()
