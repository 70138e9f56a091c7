"""The process between driver and grader. It runs no foreign code, so nothing a grader does can stop it.

It starts the grader, sealed, adopts whatever the grader leaves behind, shows what the grader prints, and ends all of
it when the driver lets go, dies, or the grader ends.
"""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from typing import NoReturn

from vexact import env
from vexact.reward.sandbox import linux, tree
from vexact.reward.sandbox.policy import SandboxPolicy
from vexact.reward.sandbox.relay import Relay
from vexact.reward.sandbox.seal import seal

_LOOK_MS = 500  # how often to see whether the driver lives, should a fork of it hold the lifeline open


def main(channel: int, lifeline: int, driver: int, policy: SandboxPolicy) -> NoReturn:
    """Guard one grader until it ends.

    Args:
        channel: descriptor of the grader's connection to the driver.
        lifeline: descriptor of a pipe whose other end the driver holds.
        driver: the driver's process id.
        policy: what the grader may do.
    """
    scratch = tempfile.mkdtemp(prefix="vexact-grader-")
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    output, printed = os.pipe()
    ending: list[int] = []
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: ending.append(number))
    with suppress(OSError):
        linux.adopt_orphans()
    warden = os.getpid()
    grader = os.fork()
    if grader == 0:
        for descriptor in (wake, woken, output, lifeline):
            os.close(descriptor)
        _become_grader(channel, printed, policy, scratch, warden, driver)
    os.close(channel)
    os.close(printed)
    relay, status = Relay(output), None
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(lifeline, 0)  # only errors and hang-up
    poll.register(output, select.POLLIN)
    while status is None and not ending and os.getppid() == driver:
        events = dict(poll.poll(_LOOK_MS))
        if lifeline in events:
            break
        if wake in events:
            os.read(wake, 4096)
        if output in events and not relay.pump():
            poll.unregister(output)
        status = _reap(grader)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(grader, signal.SIGKILL)  # all of the group at once: no fork escapes it
    tree.end_descendants()
    relay.drain()
    shutil.rmtree(scratch, ignore_errors=True)
    _exit_like(status)


def _become_grader(
    channel: int, printed: int, policy: SandboxPolicy, scratch: str, warden: int, driver: int
) -> NoReturn:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    with suppress(OSError):
        linux.die_with_parent(signal.SIGKILL)
    if os.getppid() != warden:  # it died before it could take this process with it
        os._exit(1)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    os.close(printed)
    env.set_scratch(scratch)
    tempfile.tempdir = None  # forget what the warden found
    code = 1
    try:
        lacking = seal(policy, scratch, (warden, driver))
        from vexact.reward.worker import main as serve

        serve(channel, lacking)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)  # not by way of the interpreter's end, where foreign threads and exit handlers would run


def _reap(grader: int) -> int | None:
    """Collect what has ended; the grader's wait status once it is among them."""
    found = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == grader:
                found = ended[1]
    return found


def _exit_like(status: int | None) -> NoReturn:
    """End as the grader did, so that the driver can say how."""
    if status is not None and os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(0 if status is None else os.waitstatus_to_exitcode(status))
