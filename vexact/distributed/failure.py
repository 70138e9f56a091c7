"""What a worker met, as a record that travels, and the exception that the driver makes of it."""

from __future__ import annotations

import pickle
import re
import sys
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from vexact.distributed.errors import WorkerError, WorkerTraceback
from vexact.distributed.layout import RankInfo

Kind = Literal["died", "memory", "raised", "bug", "consequence"]
# Which failure of several is the cause: what is further left explains what is further right.
CAUSES: tuple[Kind, ...] = ("died", "memory", "raised", "bug", "consequence")
MEMORY_ADVICE = (
    "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu (training) or "
    "actor_rollout_ref.rollout.gpu_memory_utilization (generation)"
)
_LOST_PEER = re.compile(
    r"gloo|NCCL|TCPStore|Connection (closed|reset) by peer|Broken pipe|Socket Timeout|process group .*(abort|time)",
    re.IGNORECASE,
)
_NO_HOST_MEMORY = re.compile(r"DefaultCPUAllocator: (can't|not enough memory)|Cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Failure:
    """One rank's failure.

    Attributes:
        rank: who failed.
        kind: ``died``: the process is gone. ``memory``: a GPU or the host had no more. ``raised``: an error that is
            meant for users. ``bug``: any other error. ``consequence``: it lost, or was stopped by, another rank.
        summary: one line or a few, for people.
        traceback: the worker's own, as text.
        error: what was raised, or that pickled; None where it cannot be.
    """

    rank: int
    kind: Kind
    summary: str
    traceback: str = ""
    error: BaseException | bytes | None = None


def failure_of(error: BaseException, rank: int, memory_advice: str | None = None, travels: bool = True) -> Failure:
    """The record of what a worker raised; ``memory_advice`` names what to lower if it ran out of memory."""
    kind = _kind(error)
    summary = str(error) if kind == "raised" else f"{type(error).__qualname__}: {error}".removesuffix(": ")
    if kind == "memory":
        summary = f"{first_sentences(str(error))} To need less memory: {memory_advice or MEMORY_ADVICE}"
    text = "".join(traceback.format_exception(type(error), error, _own_frames(error)))
    return Failure(rank, kind, summary, text, _pickled(error) if travels else error)


def error_of(failure: Failure, info: RankInfo, stage: str) -> Exception:
    """The exception that the driver raises for a failure: the original where it was meant for users."""
    error = pickle.loads(failure.error) if isinstance(failure.error, bytes) else failure.error
    cause = error if isinstance(failure.error, BaseException) else WorkerTraceback(failure.traceback)
    if failure.kind == "raised" and isinstance(error, Exception):
        error.add_note(f"raised by {info} in {stage}")
        if error is not cause and error.__cause__ is None:
            error.__cause__ = cause
        return error
    text = {
        "died": f"{info} died in {stage}: {failure.summary}",
        "memory": f"{info} ran out of memory in {stage}: {failure.summary}",
        "raised": f"{info} in {stage}: {failure.summary}",
        "bug": f"{info} failed in {stage}: {failure.summary}",
        "consequence": f"{info} lost another rank in {stage}, which did not say why: {failure.summary}",
    }[failure.kind]
    is_fault = failure.kind in ("died", "consequence")
    raised = WorkerError(text, failure.rank, stage, failure.kind == "bug", is_fault)
    if failure.kind != "died":
        raised.__cause__ = cause
    return raised


def _kind(error: BaseException) -> Kind:
    if getattr(error, "is_consequence", False) or isinstance(error, KeyboardInterrupt):
        return "consequence"
    if ran_out_of_memory(error):
        return "memory"
    if isinstance(error, RuntimeError) and (_is_torch(error, "distributed.DistError") or _lost_peer(error)):
        return "consequence"
    if isinstance(error, (ValueError, OSError)) or type(error).__module__.split(".")[0] == "vexact":
        return "raised"
    return "bug"


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host had no more."""
    if isinstance(error, MemoryError) or _is_torch(error, "OutOfMemoryError"):
        return True
    return isinstance(error, (RuntimeError, OSError)) and _NO_HOST_MEMORY.search(str(error)) is not None


def _is_torch(error: BaseException, name: str) -> bool:
    kind = sys.modules.get("torch")
    for part in name.split("."):
        kind = getattr(kind, part, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _lost_peer(error: RuntimeError) -> bool:
    return type(error) is RuntimeError and _LOST_PEER.search(str(error)) is not None


def first_sentences(text: str) -> str:
    """Of an error of want of memory: what was asked for and what there is, of PyTorch's half page."""
    sentences = re.split(r"(?<=\.)\s+", text.strip())
    return " ".join(sentences[:3]) if len(text) > 200 else text.strip().rstrip(".") + "."


def _own_frames(error: BaseException) -> TracebackType | None:
    """The traceback without the frames of the host that called the worker."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_globals.get("__hides_frames__"):
        frames = frames.tb_next
    return frames


def _pickled(error: BaseException) -> bytes | None:
    """The error as bytes if it is the same error again on the other side."""
    try:
        data = pickle.dumps(error)
        same = pickle.loads(data)
    except Exception:
        return None
    return data if type(same) is type(error) and str(same) == str(error) else None
