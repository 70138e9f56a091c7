"""What is said when memory runs out: the settings that make room for the stage that it ran out in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from vexact.config import Config
from vexact.config.memory import MemoryStage, out_of_memory_advice
from vexact.distributed.failure import first_sentences, ran_out_of_memory

_OF_METHOD: Mapping[str, MemoryStage] = {  # of a worker
    "generate": "generation",
    "resume_kv_cache": "generation",
    "update": "update",
    "rescore": "update",
    "reference_logprobs": "update",
    "sync": "sync",
}
_OF_TIMER: Mapping[str, MemoryStage] = {"gen": "generation", "testing": "generation", "update_weights": "sync"}


class RunOutOfMemory(RuntimeError):
    """The GPU, or the host, has no more."""


def memory_advice(config: Config) -> dict[str, str]:
    """By method of a worker, what makes room for it."""
    return {method: out_of_memory_advice(config, stage) for method, stage in _OF_METHOD.items()}


@contextmanager
def advising(config: Config, stage: Callable[[], str | None]) -> Iterator[None]:
    """Makes an error of want of memory one that says what makes room.

    Args:
        stage: the timer that runs when it happens; None for the start.

    Raises:
        RunOutOfMemory: in place of the error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        timer = stage()
        during: MemoryStage = "start-up" if timer is None else _OF_TIMER.get(timer, "update")
        advice = out_of_memory_advice(config, during)
        text = first_sentences(str(error) or type(error).__name__)
        raise RunOutOfMemory(f"out of memory in {during}: {text} To need less memory: {advice}") from error
