"""What a grader process does: load the function, grade what arrives, answer."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

from vexact.reward.channel import GraderEnd, ScoreMessage
from vexact.reward.graders import grader_for
from vexact.reward.outcome import Outcome, failure
from vexact.reward.spec import GradeRequest, RewardError, RewardSpec, ScoreFunction, call, load_function

Batch = tuple[str, list[tuple[int, GradeRequest]]]


def main(descriptor: int, lacking: dict[str, str]) -> None:
    """Serve until the driver closes the connection.

    Messages in: the ``RewardSpec`` once, then batches ``(token, [(index, GradeRequest), …])``. Messages out:
    ``["hello", lacking]``, then ``["ready"]`` or ``["failed", message]``; per batch ``["start", token]`` when its
    graders are imported, then for each request in order a ``ScoreMessage`` or ``["failure", token, index, kind,
    message, traceback, seconds]``.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # one that reaches the worker ends it, without a traceback
    channel = GraderEnd(socket.socket(fileno=descriptor))
    try:
        channel.send(["hello", lacking])
        _serve(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _serve(channel: GraderEnd) -> None:
    function: ScoreFunction | None = None
    spec, grade_batch = RewardSpec(), _grade_batch  # a local name, which a grader that patches modules cannot change
    while True:
        for message in channel.receive():
            if function is not None:
                grade_batch(channel, function, spec, message)
                continue
            spec = message
            try:
                function = load_function(spec)
            except RewardError as error:
                channel.send(["failed", str(error)])
                return
            channel.send(["ready"])


def _grade_batch(channel: GraderEnd, function: ScoreFunction, spec: RewardSpec, batch: Batch) -> None:
    token, requests = batch
    pid, grade_one, message_of, getpid = os.getpid(), grade, _message, os.getpid
    if not spec.is_custom:
        _import_graders({request.data_source for _, request in requests})
    channel.send(["start", token])
    for index, request in requests:
        outcome = grade_one(function, request, spec.kwargs, BaseException)
        if getpid() != pid:  # a fork that a grader made and let return
            os._exit(0)
        channel.send(message_of(token, index, outcome))


def _message(token: str, index: int, outcome: Outcome) -> list[Any] | ScoreMessage:
    if outcome.status == "ok":
        return ScoreMessage(token, index, outcome.value, outcome.extra or {}, outcome.seconds)
    return ["failure", token, index, outcome.kind, outcome.message, outcome.traceback, outcome.seconds]


def _import_graders(data_sources: set[str]) -> None:
    """Import before the clock starts; a grader that cannot be imported fails each sample with its own message."""
    for data_source in data_sources:
        try:
            grader_for(data_source)
        except (ImportError, ValueError):
            continue


def grade(
    function: ScoreFunction,
    request: GradeRequest,
    kwargs: dict[str, Any],
    caught: type[BaseException] | tuple[type[BaseException], ...] = (Exception, SystemExit),
) -> Outcome:
    """One call; whatever the grader raises, of the kinds ``caught``, becomes an outcome."""
    started = time.perf_counter()
    try:
        outcome = call(function, request, kwargs)
    except caught as error:  # a grader is foreign code and may raise anything
        outcome = failure(error)
    return outcome._replace(seconds=time.perf_counter() - started, key=request.key)
