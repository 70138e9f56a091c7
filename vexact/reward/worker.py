"""The process that runs graders. It leads its own process group and dies with the driver."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
import traceback
from typing import Any

from vexact.reward.channel import Channel
from vexact.reward.graders import grader_for
from vexact.reward.spec import GradeRequest, Outcome, RewardError, RewardSpec, ScoreFunction, call, load_function

_GRACE_S = 10.0  # how long after the driver's deadline the kernel ends a worker that nobody killed
_TRACEBACK_LINES = 12


def main(descriptor: int) -> None:
    """Serve until the driver closes the connection.

    Messages in: ``(spec, timeout_s)`` once, then lists of ``(index, GradeRequest)``. Messages out: ``("ready",)`` or
    ``("failed", message)`` once; per list ``("start",)`` when its graders are imported, then
    ``("result", index, outcome)`` for each request in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # one that reaches the worker ends it, without a traceback
    os.set_inheritable(descriptor, False)
    connection = socket.socket(fileno=descriptor)
    threading.Thread(target=_die_with_driver, args=(descriptor,), daemon=True).start()
    channel = Channel(connection)
    try:
        _serve(channel)
    except (EOFError, BrokenPipeError):
        return


def _serve(channel: Channel) -> None:
    function: ScoreFunction | None = None
    spec, limit_s = RewardSpec(), 0.0
    while True:
        for message in channel.receive():
            if function is not None:
                _grade_all(channel, function, spec, message, limit_s)
                continue
            spec, limit_s = message
            try:
                function = load_function(spec)
            except RewardError as error:
                channel.send(("failed", str(error)))
                return
            channel.send(("ready",))


def _grade_all(
    channel: Channel, function: ScoreFunction, spec: RewardSpec, batch: list[tuple[int, GradeRequest]], limit_s: float
) -> None:
    if not spec.is_custom:
        _import_graders({request.data_source for _, request in batch})
    channel.send(("start",))
    for index, request in batch:
        # SIGALRM's default action ends the process even while an extension holds the interpreter lock, so a grader that
        # hangs cannot outlive a driver that was killed.
        signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
        outcome = grade(function, request, spec.kwargs)
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(("result", index, outcome))


def _import_graders(data_sources: set[str]) -> None:
    """Import before the clock starts; a grader that cannot be imported fails each sample with its own message."""
    for data_source in data_sources:
        try:
            grader_for(data_source)
        except (ImportError, ValueError):
            continue


def grade(function: ScoreFunction, request: GradeRequest, kwargs: dict[str, Any]) -> Outcome:
    """One call; whatever the grader raises becomes an outcome."""
    started = time.perf_counter()
    try:
        outcome = call(function, request, kwargs)
    except (Exception, SystemExit) as error:  # a grader is foreign code and may raise anything
        excerpt = "\n".join(traceback.format_exc().strip().splitlines()[-_TRACEBACK_LINES:])
        message = f"{type(error).__name__}: {error}"
        outcome = Outcome("error", kind=type(error).__name__, message=message, traceback=excerpt)
    return outcome._replace(seconds=time.perf_counter() - started)


def _die_with_driver(descriptor: int) -> None:
    """End the whole process group, a hanging grader and its children included, once the driver's end is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)  # only errors and hang-up
    poll.poll()
    os.killpg(os.getpgrp(), signal.SIGKILL)
